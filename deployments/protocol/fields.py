"""Every request field this server knows, and what it does with it: one table, read by validation and by the docs.

status
  served    works as documented; the type and range are in protocol/requests.py (a test keeps the two in step)
  ignored   accepted, has no effect here, and can have none on the answer's meaning
  refused   400 `unsupported_parameter`, unless the value is one of `harmless` (asks for what happens anyway)
Fields that are not in the table are ignored and counted (`mini_llm:unknown_request_fields_total`): many front ends
send fields of other servers. `null` always means "default".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Endpoint = Literal["chat", "completions"]
Status = Literal["served", "ignored", "refused"]
BOTH: tuple[Endpoint, ...] = ("chat", "completions")
CHAT: tuple[Endpoint, ...] = ("chat",)
TEXT: tuple[Endpoint, ...] = ("completions",)


@dataclass(frozen=True)
class Field:
    name: str
    status: Status
    endpoints: tuple[Endpoint, ...] = BOTH
    note: str = ""  # served: meaning beyond OpenAI's; ignored: why; refused: what to do instead, or when it comes
    harmless: tuple[Any, ...] = ()


def _served(names: str, endpoints: tuple[Endpoint, ...] = BOTH, note: str = "") -> list[Field]:
    return [Field(name, "served", endpoints, note) for name in names.split()]


def _ignored(names: str, endpoints: tuple[Endpoint, ...] = BOTH, note: str = "") -> list[Field]:
    return [Field(name, "ignored", endpoints, note) for name in names.split()]


_GRAMMARS = "Constrained output comes with the structured-output release; until then ask in the prompt."
_TOOLS = "Tool calling comes with the structured-output release."
_LATER = "It comes with a later release of this server."
_NEVER = "This server serves text models only."

FIELDS: tuple[Field, ...] = (
    *_served("model", note="optional while one model is served"),
    *_served("messages", CHAT),
    *_served("prompt", note="chat: a string, taken as one user message; completions: string(s) or token ids"),
    *_served("max_tokens temperature top_p n stop stream stream_options seed"),
    *_served("presence_penalty frequency_penalty logit_bias logprobs"),
    *_served("max_completion_tokens", CHAT, "wins over max_tokens"),
    *_served("top_logprobs", CHAT),
    *_served("echo", TEXT, "without logprobs"),
    *_served("best_of", TEXT, "only equal to n"),
    *_served("top_k min_p repetition_penalty stop_token_ids min_tokens ignore_eos", note="vLLM's"),
    *_served("include_stop_str_in_output skip_special_tokens priority", note="vLLM's"),
    *_served("return_token_ids", note="vLLM's: ids of prompts and answers; without `stream` only"),
    *_served("truncate_prompt_tokens", note="vLLM's: only the last so many tokens of each prompt are used"),
    *_served("timings", note="this server's own: adds the object `timings` to the answer, or to a stream's last chunk"),
    *_served("add_special_tokens", TEXT, "vLLM's: whether the tokenizer's begin-of-sequence token is put in front"),
    *_served("add_generation_prompt chat_template_kwargs", CHAT, "vLLM's"),
    *_served("continue_final_message", CHAT, "vLLM's: the answer goes on with the last, an assistant's message"),
    *_ignored("user safety_identifier metadata store service_tier", note="for the provider's books"),
    *_ignored("prompt_cache_key prompt_cache_retention prediction", note="hints; equal prefixes are always cached"),
    *_ignored("verbosity reasoning_effort parallel_tool_calls", CHAT, "no effect on models without these abilities"),
    *_ignored("request_id", note="send the header x-request-id instead"),
    Field("response_format", "refused", BOTH, _GRAMMARS, ({"type": "text"},)),
    Field("structured_outputs", "refused", BOTH, _GRAMMARS, ({},)),
    *(
        Field(name, "refused", BOTH, "It was replaced by structured_outputs. " + _GRAMMARS)
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    ),
    Field("tools", "refused", CHAT, _TOOLS, ([],)),
    Field("tool_choice", "refused", CHAT, _TOOLS, ("none", "auto")),
    Field("functions", "refused", CHAT, "It is deprecated. " + _TOOLS, ([],)),
    Field("function_call", "refused", CHAT, "It is deprecated. " + _TOOLS, ("none", "auto")),
    Field("modalities", "refused", CHAT, _NEVER, (["text"],)),
    Field("audio", "refused", CHAT, _NEVER),
    Field("web_search_options", "refused", CHAT, "This server does not search the web."),
    Field("moderation", "refused", BOTH, "This server does not moderate."),
    Field("suffix", "refused", TEXT, "Only models trained to fill in the middle support it.", ("",)),
    Field("chat_template", "refused", CHAT, "Templates of clients are not run; the model's own template is used."),
    Field("cache_salt", "refused", BOTH, "Prefix-cache isolation: " + _LATER),
    Field("prompt_logprobs", "refused", BOTH, _LATER),
    Field("add_special_tokens", "refused", CHAT, "The chat template writes them where they belong.", (False,)),
    Field("allowed_token_ids", "refused", BOTH, "Use logit_bias.", ([],)),
    Field("bad_words", "refused", BOTH, "Use logit_bias with -100 for single tokens.", ([],)),
    Field("documents", "refused", CHAT, "Put them into the messages, or into chat_template_kwargs.", ([],)),
    Field("prompt_embeds", "refused", TEXT, "Prompts are text or token ids."),
    Field("use_beam_search", "refused", BOTH, "Beam search is not planned; use n.", (False,)),
)

BY_NAME: dict[Endpoint, dict[str, Field]] = {
    endpoint: {field.name: field for field in FIELDS if endpoint in field.endpoints} for endpoint in BOTH
}
