"""`mini-llm generate`: one prompt, streamed to the terminal, with figures at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from model_core.cli import options as opt
from model_core.cli.figures import Figures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mini-llm generate",
        description="Stream an answer to the terminal. At the end: tokens/s of decoding, time to first token, and the GB/s "
        "at which decoding read weights and KV cache ((weight bytes + context x KV bytes per token) x steps / time).",
    )
    parser.add_argument("prompt", help="text, or - to read it from standard input")
    opt.add_model(parser)
    opt.add_sampling(parser, max_tokens=200)
    opt.add_engine(parser)
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    parser.add_argument("--no-kv-cache", action="store_true",
                        help="recompute the whole sequence for every token, greedily, for comparison")  # fmt: skip
    options = parser.parse_args(argv)
    if options.no_kv_cache and (options.temperature or options.repetition_penalty != 1):
        parser.error("--no-kv-cache decodes greedily: leave out --temperature and --repetition-penalty")

    local = opt.local_model(options)
    config = opt.engine_config(options, max_seqs=1)
    from model_core.engine.llm import LLM

    with LLM.load(local.path, config) as llm:
        text = sys.stdin.read() if options.prompt == "-" else options.prompt
        chat = llm.tokenizer.chat_template is not None and not options.raw
        prompt_ids = llm.encode_chat([{"role": "user", "content": text}]) if chat else llm.encode(text)
        parts = llm.engine.parts
        figures = Figures(parts.model, parts.runner.model.nbytes_per_step, parts.runner.kv.k[0].element_size(), len(prompt_ids))
        if options.no_kv_cache:
            from model_core.engine.naive import naive_stream

            chunks: Iterator[tuple[str, int]] = naive_stream(llm, prompt_ids, opt.sampling(options), options.stop)
        else:
            chunks = ((chunk.text, len(chunk.token_ids))
                      for chunk in llm.stream(prompt_ids, opt.sampling(options), stop=options.stop))  # fmt: skip
        for piece, tokens in chunks:
            figures.count(tokens)
            print(piece, end="", flush=True)
        print(flush=True)
        print(figures, file=sys.stderr)
    return 0
