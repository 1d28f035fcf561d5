"""The command `mini-llm`: one file per subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from model_core.errors import MiniLLMError

COMMANDS = {
    "generate": ("model_core.cli.generate", "continue or answer a prompt, streamed to the terminal"),
    "chat": ("model_core.cli.chat", "a conversation in the terminal"),
    "info": ("model_core.cli.info", "parameters, bytes, KV pages and limits of a model on this machine"),
    "dispatch": ("model_core.cli.dispatch", "which kernel runs for which op and size here, and why"),
    "check": ("deployments.check", "check serve_config.yaml, device, ports, memory and weights"),
    "serve": ("deployments.launch", "serve serve_config.yaml; ends with a message if the deployment fails"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its module has `main(argv) -> int`. Exit codes: 0 good, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="mini-llm", description="A white-box LLM inference engine.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    options = parser.parse_args(argv[:1])
    try:
        return importlib.import_module(COMMANDS[options.command][0]).main(argv[1:])
    except MiniLLMError as error:
        print(f"mini-llm {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, e.g. `head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
