"""One front over every tokenizer format: text to ids, ids to text, conversations to ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model_core.errors import RequestError
from model_core.tokenizer.chat import ChatTemplate, mark, pick_marker, strings_of, unmark
from model_core.tokenizer.split import AddedToken, Splitter


@dataclass
class Codec:
    """What one format (tokenizer.json, sentencepiece, GGUF) provides; everything else is common to all.

    encode(text, first): ids of plain text without control tokens; first is false for text that follows a control token.
    token_bytes: raw bytes by id, b"" for ids without a token; a special token has the bytes of its text.
    added: tokens that are cut out of text before `encode` sees it, control tokens all of them.
    prefix_ids / suffix_ids: what add_special_tokens puts around a text. strips_space: the decoder drops one leading
    space of a text (the encoder puts one there).
    """

    encode: Callable[[str, bool], list[int]]
    token_bytes: list[bytes]
    added: list[AddedToken]
    prefix_ids: list[int] = field(default_factory=list)
    suffix_ids: list[int] = field(default_factory=list)
    strips_space: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()  # skipped by decode; those of `added` are always part of it


class Tokenizer:
    """Encodes, decodes and renders conversations. Thread-safe: nothing but caches changes after construction.

    vocab_size: ids run from 0 to vocab_size - 1 (a model may have more rows, padded: such ids decode to nothing).
    """

    def __init__(self, codec: Codec, chat: ChatTemplate | None = None) -> None:
        self._codec = codec
        self._chat = chat
        self._splitter = Splitter(codec.added)
        self.vocab_size = len(codec.token_bytes)
        self.bos_id = codec.bos_id
        self.eos_ids = codec.eos_ids
        self.special_ids = codec.special_ids | {token.id for token in codec.added if token.special}
        self.strips_space = codec.strips_space
        assert all(0 <= i < self.vocab_size for i in self.special_ids)
        self._all_bytes = codec.token_bytes
        self._plain_bytes = list(codec.token_bytes)
        for i in self.special_ids:
            self._plain_bytes[i] = b""
        self._kept_bytes: dict[frozenset[int], list[bytes]] = {}

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template, None if the checkpoint has none."""
        return self._chat.source if self._chat else None

    @property
    def chat_templates(self) -> list[str]:
        """Sources of all chat templates."""
        return self._chat.sources if self._chat else []

    @property
    def takes_tools(self) -> bool:
        """Whether a chat template says what tools there are."""
        return self._chat is not None and self._chat.takes_tools

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False) -> list[int]:
        """Ids of `text`, with the model's own prefix (usually bos) if add_special_tokens.

        allow_special: a control token's text ("<|im_end|>") becomes its id; otherwise it is plain text, as anything a
        user types should be. Raises RequestError for text that is not valid Unicode (lone surrogates).
        """
        _check_unicode(text)
        ids = self._encode_obeying(text) if allow_special else self._codec.encode(text, True) if text else []
        return [*self._codec.prefix_ids, *ids, *self._codec.suffix_ids] if add_special_tokens else ids

    def _encode_obeying(self, text: str, marker: str = "") -> list[int]:
        """Ids of text whose control tokens are obeyed; `marker` is taken out of what lies between them."""
        ids: list[int] = []
        for piece, token, start in self._splitter.split(text):
            if token is not None:
                ids.append(token.id)
                continue
            plain = unmark(piece, marker) if marker else piece
            if plain:
                ids += self._codec.encode(plain, start == 0)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, one per maximal invalid part (Unicode 15, 3.9).

        Equal to the reference libraries wherever the bytes are valid; on broken byte-fallback runs those put one U+FFFD
        per byte, which no incremental decoder can follow. Ids past the vocabulary decode to nothing; negative ids
        raise RequestError.
        """
        table, size = self.byte_table(skip_special_tokens=skip_special_tokens), self.vocab_size
        if ids and min(ids) < 0:
            raise RequestError(f"token id {min(ids)} is negative; ids run from 0 to {size - 1}", code="invalid_value")
        text = b"".join([table[i] for i in ids if i < size]).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def byte_table(self, *, skip_special_tokens: bool, keep: frozenset[int] = frozenset()) -> list[bytes]:
        """Bytes by id, special tokens as b"" or as their text; those of `keep` always so. Shared: do not change it."""
        if not skip_special_tokens:
            return self._all_bytes
        if not keep:
            return self._plain_bytes
        table = self._kept_bytes.get(keep)
        if table is None:
            table = list(self._plain_bytes)
            for i in keep:
                table[i] = self._all_bytes[i]
            self._kept_bytes[keep] = table
        return table

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token (of its text, for a special token); b"" for an id without a token."""
        return self._all_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """One token for display; parts of characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def render_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """The conversation as the model's chat template writes it.

        Raises RequestError if there is no template, if it refuses the messages, or if its limits are exceeded.
        """
        return self._require_chat().render(messages, add_generation_prompt=add_generation_prompt, **template_kwargs)

    def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True,
        continue_final_message: bool = False, **template_kwargs: Any,
    ) -> list[int]:  # fmt: skip
        """Ids of the rendered conversation. Control tokens are obeyed where the template wrote them, never where a
        message, a tool or another argument did. Nothing is added around it (transformers' apply_chat_template): bos is
        there if and only if the template wrote it.

        continue_final_message: the ids end with the last message's text, for the model to go on with it. Raises
        RequestError if the template does not show that text.
        """
        chat, marker = self._require_chat(), ""
        strings = list(strings_of([messages, template_kwargs]))
        for string in strings:
            _check_unicode(string)
        if any(self._splitter.touches(string) for string in strings):
            marker = pick_marker([*strings, *chat.sources])
            messages = mark(messages, self._splitter, marker)
            template_kwargs = {name: mark(value, self._splitter, marker) for name, value in template_kwargs.items()}
        text = chat.render(messages, add_generation_prompt=add_generation_prompt, **template_kwargs)
        if continue_final_message:
            text = _up_to(text, messages[-1]["content"])
        return self._encode_obeying(text, marker)

    def _require_chat(self) -> ChatTemplate:
        if self._chat is None:
            raise RequestError(
                "this model has no chat template, so messages cannot be turned into a prompt; "
                "write the prompt yourself and send it to /v1/completions",
                param="messages",
                code="chat_template_missing",
            )
        return self._chat


def _up_to(text: str, content: str) -> str:
    """A conversation as far as its last message's content goes; templates may strip that (as transformers does it)."""
    stripped = content.strip()
    at = text.rfind(stripped) if stripped else -1
    if at < 0:
        raise RequestError("the chat template does not show the last message's text, so it cannot be continued",
                           param="continue_final_message", code="invalid_value")  # fmt: skip
    whole = content.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else stripped)]


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text is not valid Unicode: half a surrogate pair (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}; send the whole character",
            code="invalid_value",
        ) from None
