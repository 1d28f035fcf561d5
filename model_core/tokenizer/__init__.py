"""Text and token ids: load_tokenizer, Tokenizer, Detokenizer (imported on first use)."""

from typing import Any

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer"]
_HOMES = {"Detokenizer": "detokenizer", "Tokenizer": "tokenizer", "load_tokenizer": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
