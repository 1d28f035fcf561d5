"""How tools, calls and their results get into a prompt: by the model's chat template, or as text for one without words for
them, in Hermes' form (the one that small models follow best)."""

from __future__ import annotations

import json
from typing import Any

from deployments.tools.family import Family
from model_core.errors import RequestError
from model_core.tokenizer.tokenizer import Tokenizer

_INSTRUCTIONS = """You may call functions to answer. These are the functions, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments inside <tool_call></tool_call> tags:
<tool_call>
{{"name": <function name>, "arguments": <object with the arguments>}}
</tool_call>
For several calls, write several such blocks. The results will be given to you inside <tool_response></tool_response> tags."""


def with_tools(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], tokenizer: Tokenizer, family: Family
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and arguments for the chat template. messages and tools as protocol/ gives them: content is text.

    Raises RequestError if the template knows no tools and the model's form of calls is not the one written here.
    """
    if tokenizer.takes_tools:
        return messages, {"tools": tools} if tools else {}
    if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return messages, {}
    if family.name != "hermes":
        raise RequestError(f"the model's chat template knows no tools; they can be described in Hermes' form, not in that "
                           f"of the setting tool_parser: {family.name}", param="tools", code="chat_template_missing")
    plain = _as_text(messages)
    if tools:
        told = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if plain and plain[0]["role"] == "system":
            first = plain[0]
            plain[0] = {**first, "content": f"{first['content']}\n\n{told}" if first["content"] else told}
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain, {}


def _as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls as text of the assistant; results, those of one turn together, as text of the user (as Qwen's template does)."""
    plain: list[dict[str, Any]] = []
    is_result = False
    for message in messages:
        was_result, is_result = is_result, message["role"] == "tool"
        if is_result:
            told = f"<tool_response>\n{message['content']}\n</tool_response>"
            if was_result:
                plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{told}"}
            else:
                plain.append({"role": "user", "content": told})
        elif message.get("tool_calls"):
            said = [message["content"]] if message["content"] else []
            said += [f"<tool_call>\n{_object(call['function'])}\n</tool_call>" for call in message["tool_calls"]]
            plain.append({"role": "assistant", "content": "\n".join(said)})
        else:
            plain.append(message)
    return plain


def _object(call: dict[str, Any]) -> str:
    return json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
