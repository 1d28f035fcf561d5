"""`mini-llm info MODEL`: what a model is, and what this machine makes of it."""

from __future__ import annotations

import argparse

from model_core.cli import options as opt
from model_core.weights.progress import format_bytes


def main(argv: list[str]) -> int:
    about = "Parameters, bytes, KV pages and limits of a model here."
    parser = argparse.ArgumentParser(prog="mini-llm info", description=about)
    opt.add_model(parser, positional=True)
    opt.add_engine(parser)
    options = parser.parse_args(argv)
    local = opt.local_model(options)
    config = opt.engine_config(options)

    from rich.console import Console
    from rich.table import Table

    from model_core.dispatch.ops import Ops
    from model_core.engine.load import place
    from model_core.tokenizer.load import load_tokenizer
    from model_core.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(local.path)
    tokenizer = load_tokenizer(local.path)
    model = checkpoint.config
    placed = place(model, config)
    console = Console()

    def table(title: str, rows: list[tuple[str, str]]) -> None:
        view = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for row in rows:
            view.add_row(*row)
        console.print(view)

    scaling, head = model.rope_scaling, "tied" if model.tie_embeddings else "own"
    table(local.name, [
        ("from", f"{local.path} ({local.source})"),
        ("family", model.family),
        ("parameters", f"{model.num_parameters:,}"),
        ("on disk", format_bytes(sum(stored.nbytes for stored in checkpoint.tensors.values()))),
        ("layers x hidden x MLP", f"{model.num_layers} x {model.hidden_size} x {model.intermediate_size}"),
        ("heads (query, key/value) x size", f"({model.num_heads}, {model.num_kv_heads}) x {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size} rows, {tokenizer.vocab_size} tokens, head {head}"),
        ("context", f"{model.context_length} tokens, sliding window {model.sliding_window or 'none'}"),
        ("rotary", f"theta {model.rope_theta:g}, scaling {scaling.kind}"),
        ("end-of-sequence ids", ", ".join(map(str, model.eos_ids)) or "none"),
        ("chat template", "yes" if tokenizer.chat_template else "no"),
    ])  # fmt: skip
    limits, ledger = placed.limits, placed.ledger
    table("on this machine", [
        ("device, dtype", f"{placed.device.type}, {str(placed.dtype).removeprefix('torch.')}"),
        ("sequences at once", str(limits.max_seqs)),
        ("tokens per step", str(limits.max_batch_tokens)),
        ("prompt + answer", f"{limits.max_context} tokens"),
        ("KV pages", f"{ledger.num_pages} of {config.page_size} tokens, {format_bytes(ledger.page_bytes)} each"),
    ])  # fmt: skip
    table("memory", [(name, f"{size / 2**30:.2f} GiB") for name, size in ledger.rows()])
    view = Table(title="dispatch", title_justify="left")
    for column in ("op", "rule", "choice", "reason"):
        view.add_column(column)
    for row in Ops(placed.device, overrides=config.kernels).explain():
        view.add_row(row["op"], row["rule"], row["choice"], row["reason"])
    console.print(view)
    return 0
