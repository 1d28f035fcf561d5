"""`mini-llm chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from model_core.cli import options as opt
from model_core.cli.figures import Figures
from model_core.errors import RequestError

HELP = """/reset        forget the conversation
/system TEXT  start again with this system message
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mini-llm chat", description="A conversation in the terminal.\n\n" + HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    opt.add_model(parser)
    opt.add_sampling(parser, max_tokens=1000)
    opt.add_engine(parser)
    parser.add_argument("--system", help="system message")
    options = parser.parse_args(argv)
    local = opt.local_model(options)
    config = opt.engine_config(options, max_seqs=1)
    from model_core.engine.llm import LLM

    with LLM.load(local.path, config) as llm:
        print(f"{local.name} on {llm.engine.info.device}. /help for commands.", file=sys.stderr)
        conversation = _begin(options.system)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line in ("/exit", "/quit"):
                return 0
            if line == "/reset":
                conversation = _begin(options.system)
            elif line.startswith("/system"):
                options.system = line.removeprefix("/system").strip() or None
                conversation = _begin(options.system)
            elif line.startswith("/"):
                print(HELP)
            elif line:
                conversation.append({"role": "user", "content": line})
                try:
                    answer = _answer(llm, conversation, options)
                    conversation.append({"role": "assistant", "content": answer})
                except RequestError as error:
                    conversation.pop()
                    print(f"{error} (/reset forgets the conversation)", file=sys.stderr)


def _begin(system: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] if system else []


def _answer(llm: Any, conversation: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Print the answer as it comes. Ctrl-C keeps what there is."""
    prompt_ids = llm.encode_chat(conversation)
    parts = llm.engine.parts
    figures = Figures(parts.model, parts.runner.model.nbytes_per_step, parts.runner.kv.k[0].element_size(), len(prompt_ids))
    text = ""
    stream = llm.stream(prompt_ids, opt.sampling(options), stop=options.stop)
    try:
        for chunk in stream:
            figures.count(len(chunk.token_ids))
            text += chunk.text
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        stream.close()
    print(flush=True)
    print(figures, file=sys.stderr)
    return text
