"""Requests about tokens alone: POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from deployments.protocol.errors import bad_request
from deployments.protocol.requests import Message
from deployments.protocol.validation import translate
from deployments.protocol.values import TokenId

T = TypeVar("T", bound=BaseModel)


class TokenizeRequest(BaseModel):
    """A text, or a conversation as the model's chat template writes it."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr = ""
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: StrictBool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: StrictStr = ""
    tokens: list[TokenId]


def parse_tokenize(body: dict[str, Any]) -> TokenizeRequest:
    """Raises ApiError 400."""
    request = _parse(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("Send either 'prompt' or 'messages'.", param="prompt", code="missing_required_parameter")
    return request


def parse_detokenize(body: dict[str, Any]) -> DetokenizeRequest:
    """Raises ApiError 400."""
    return _parse(DetokenizeRequest, body)


def _parse(model: type[T], body: dict[str, Any]) -> T:
    try:
        return model.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise translate(error) from None
