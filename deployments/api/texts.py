"""Routes about the tokenizer: what a text's tokens are, and what it would take to do the same elsewhere."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.answer import Json
from deployments.api.incoming import read_body
from deployments.api.job import refused
from deployments.api.prompts import check_ids, encode_conversation
from deployments.api.service import Service
from deployments.protocol.messages import for_template
from deployments.protocol.tokens import TokenizeRequest, parse_detokenize, parse_tokenize
from deployments.protocol.tools import toolbox
from model_core.errors import RequestError


class TextRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """{count, max_model_len, tokens, token_strs}. A text may be longer than the context: its count is what is asked."""
        service = self._service
        asked, unknown = parse_tokenize(await read_body(service, request))
        service.metrics.unknown_fields += len(unknown)
        info = await service.check_model(asked.model)
        try:
            ids = await self._encode(asked)
        except RequestError as error:
            raise refused(error) from None
        strings = [service.tokenizer.token_text(i) for i in ids] if asked.return_token_strs else None
        return Json({"count": len(ids), "max_model_len": info.context_length, "tokens": ids, "token_strs": strings})

    async def detokenize(self, request: Request) -> Response:
        """{prompt}: the text of the ids, control tokens included."""
        service = self._service
        asked, unknown = parse_detokenize(await read_body(service, request))
        service.metrics.unknown_fields += len(unknown)
        check_ids(await service.check_model(asked.model), asked.tokens, "tokens")
        work = lambda: service.tokenizer.decode(asked.tokens, skip_special_tokens=False)  # noqa: E731
        return Json({"prompt": await service.text_work(len(asked.tokens), work)})

    async def tokenizer_info(self, request: Request) -> Response:
        """What lm-eval and others ask for so as to render conversations themselves."""
        tokenizer, info = self._service.tokenizer, await self._service.info()

        def text(token_id: int | None) -> str | None:
            return None if token_id is None else tokenizer.token_text(token_id)

        return Json({
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": info.context_length,
            "bos_token": text(tokenizer.bos_id),
            "eos_token": text(next(iter(tokenizer.eos_ids), None)),
            "chat_template": tokenizer.chat_template,
        })  # fmt: skip

    async def _encode(self, asked: TokenizeRequest) -> list[int]:
        service = self._service
        if asked.messages is None:
            text, special = asked.prompt or "", asked.add_special_tokens
            return await service.text_work(
                len(text), lambda: service.tokenizer.encode(text, add_special_tokens=special, allow_special=True)
            )
        tools = toolbox(asked.tools, None, True)
        return await encode_conversation(service, for_template(asked.messages), tools.functions if tools else (), asked)
