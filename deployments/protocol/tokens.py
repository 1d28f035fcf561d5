"""Requests about tokens alone: POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from deployments.protocol.errors import bad_request, unsupported
from deployments.protocol.requests import Message, check_continued, parse_fields
from deployments.protocol.tools import Tools
from deployments.protocol.values import TokenId, one_of_them


class TokenizeRequest(BaseModel):
    """A text, or a conversation as the model's chat template writes it."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=one_of_them("prompt", "messages"))

    model: StrictStr = ""
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: StrictBool = True  # of a prompt
    add_generation_prompt: StrictBool | None = None  # true unless the last message is continued
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: Tools = []
    return_token_strs: StrictBool = False

    @property
    def generation_prompt(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: StrictStr = ""
    tokens: list[TokenId]


def parse_tokenize(body: dict[str, Any]) -> tuple[TokenizeRequest, list[str]]:
    """The validated request and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(TokenizeRequest, "tokenize", body)
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("Send either 'prompt' or 'messages'.", param="prompt", code="missing_required_parameter")
    check_continued(request)
    if request.messages is not None and "add_special_tokens" in request.model_fields_set and request.add_special_tokens:
        raise unsupported("add_special_tokens", "The chat template writes special tokens where they belong: leave it out.")
    for name in ("tools", "chat_template_kwargs", "add_generation_prompt"):
        if request.prompt is not None and getattr(request, name):
            raise bad_request(f"'{name}' is only allowed with 'messages': a prompt is tokenized as it is.", param=name)
    return request, unknown


def parse_detokenize(body: dict[str, Any]) -> tuple[DetokenizeRequest, list[str]]:
    """The validated request and the names of unknown fields. Raises ApiError 400."""
    return parse_fields(DetokenizeRequest, "detokenize", body)
