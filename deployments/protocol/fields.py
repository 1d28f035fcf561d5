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

Endpoint = Literal["chat", "completions", "responses", "messages", "tokenize", "detokenize"]
Status = Literal["served", "ignored", "refused"]
BOTH: tuple[Endpoint, ...] = ("chat", "completions")
CHAT: tuple[Endpoint, ...] = ("chat",)
TEXT: tuple[Endpoint, ...] = ("completions",)
RESPONSES: tuple[Endpoint, ...] = ("responses",)
MESSAGES: tuple[Endpoint, ...] = ("messages",)
DIALECTS = RESPONSES + MESSAGES
TOKENIZE: tuple[Endpoint, ...] = ("tokenize",)
DETOKENIZE: tuple[Endpoint, ...] = ("detokenize",)
ALL = BOTH + DIALECTS


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


_HOSTED = "This server runs no tools itself; describe functions in tools, and run them in the client."
_MEMORY = "Answers are not stored here: send the whole conversation as input."
_DISPLAYS: tuple[dict[str, str], ...] = ({}, {"display": "summarized"}, {"display": "omitted"})
_NEVER = "This server serves text models only."

FIELDS: tuple[Field, ...] = (
    *_served("model", BOTH + RESPONSES + TOKENIZE + DETOKENIZE, "optional while one model is served"),
    *_served("model", MESSAGES),
    *_served("messages", CHAT),
    *_served("messages", MESSAGES, "text, calls and their results; thinking is not shown to models"),
    *_served("prompt messages return_token_strs", TOKENIZE),
    *_served("add_special_tokens", TOKENIZE, "with a prompt"),
    *_served("add_generation_prompt continue_final_message chat_template_kwargs", TOKENIZE, "with messages, as in chat"),
    *_served("tokens", DETOKENIZE),
    *_served("prompt", note="chat: a string, taken as one user message; completions: token ids, or string(s), in which control "
                            "tokens are obeyed"),
    *_served("max_tokens"),
    *_served("max_tokens", MESSAGES, "beyond the context: all the room there is; clients must send one, and many make it up"),
    *_served("temperature top_p stream", ALL),
    *_served("n stop stream_options"),
    *_served("logprobs", note="of the model's own distribution: before logit_bias, penalties, temperature and grammars"),
    *_served("seed", ALL, "choice k has seed + k. Same system_fingerprint, same request: same text; beside other requests for "
                          "certain only with the server's setting engine.deterministic"),
    *_served("presence_penalty frequency_penalty logit_bias", ALL),
    *_served("max_completion_tokens", CHAT, "wins over max_tokens"),
    *_served("top_logprobs", CHAT),
    *_served("echo", TEXT, "with logprobs the prompt is scored: null for its first token; max_tokens may be 0"),
    *_served("prompt_logprobs", note="vLLM's: so many alternatives of each prompt token; streamed once, with the first chunk"),
    *_served("best_of", TEXT, "only equal to n"),
    *_served("top_k min_p repetition_penalty stop_token_ids min_tokens ignore_eos", ALL, "vLLM's"),
    *_served("include_stop_str_in_output skip_special_tokens priority", ALL, "vLLM's"),
    *_served("request_id", note="vLLM's: ends the answer's id; logs and spans have the header x-request-id"),
    *_served("return_token_ids", note="vLLM's: adds `prompt_token_ids` and `token_ids`"),
    *_served("cache_salt", ALL, "vLLM's: cached prefixes are shared only with requests of the same salt"),
    *_served("truncate_prompt_tokens", ALL, "vLLM's: only the last so many tokens of each prompt are used; -1: what fits"),
    *_served("timings", note="this server's own: adds the object `timings` to the answer, or to a stream's last chunk"),
    *_served("add_special_tokens", TEXT, "vLLM's: whether the tokenizer's begin-of-sequence token is put in front"),
    *_served("add_generation_prompt", CHAT, "vLLM's"),
    *_served("chat_template_kwargs", CHAT + DIALECTS, "vLLM's"),
    *_served("continue_final_message", CHAT, "vLLM's: the answer goes on with the last, an assistant's message"),
    *_served("reasoning_effort", CHAT, "given to the model's chat template, which may use it"),
    *_served("tools", CHAT + RESPONSES + MESSAGES, "functions; `strict` arguments fit their schema, or the schema is refused"),
    *_served("tools", TOKENIZE, "functions, with messages: as in chat with tool_choice 'auto'"),
    *_served("tool_choice", CHAT + RESPONSES + MESSAGES, "only tools that may be called are shown to the model"),
    *_served("parallel_tool_calls", CHAT + RESPONSES, "false ends the answer with its first call, true with its 32nd"),
    *_served("input", RESPONSES, "a string, or messages of text, calls and their results; reasoning is not shown to models"),
    *_served("instructions max_output_tokens", RESPONSES),
    *_served("stop", RESPONSES, "vLLM's"),
    *_served("metadata", RESPONSES, "comes back in the answer"),
    *_served("reasoning", RESPONSES, "its effort is given to the model's chat template, which may use it"),
    *_served("response_format", note="text, json_object (which may have a schema) or json_schema, strict or not: every keyword "
             "is held, or refused; beside tools it holds for answers without calls"),
    *_served("structured_outputs", ALL, "vLLM's: one of json, json_object, regex, choice and grammar (not beside tools)"),
    *_served("text", RESPONSES, "its format, as response_format in chat"),
    *_served("output_config", MESSAGES, "its format, as response_format in chat; its effort is given to the chat template; "
                                        "others of its members are refused"),
    *_served("system", MESSAGES, "a string, or text blocks"),
    *_served("stop_sequences", MESSAGES),
    *_ignored("user safety_identifier service_tier", BOTH + RESPONSES, "for the provider's books"),
    *_ignored("metadata", BOTH + MESSAGES, "for the provider's books"),
    *_ignored("store", BOTH, "for the provider's books"),
    *_ignored("store", RESPONSES, "nothing is stored here, and answers say so"),
    *_ignored("service_tier inference_geo", MESSAGES, "for the provider's books"),
    *_ignored("speed", MESSAGES, "a hint"),
    *_ignored("diagnostics", MESSAGES, "about cached prefixes of earlier answers, which are not stored here"),
    *_ignored("prompt_cache_key prompt_cache_retention prompt_cache_options", BOTH + RESPONSES,
              "hints; equal prefixes are always cached"),
    *_ignored("prediction", note="a hint"),
    *_ignored("cache_control", MESSAGES, "a hint; equal prefixes are always cached"),
    *_ignored("verbosity", CHAT, "no effect on models without these abilities"),
    *_ignored("stream_options", RESPONSES, "padding against traffic analysis is not sent"),
    *(
        Field(name, "refused", ALL, "It was replaced by structured_outputs.")
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    ),
    Field("functions", "refused", CHAT, "It is deprecated: use tools.", ([],)),
    Field("function_call", "refused", CHAT, "It is deprecated: use tool_choice.", ("none", "auto")),
    Field("modalities", "refused", CHAT, _NEVER, (["text"],)),
    Field("audio", "refused", CHAT, _NEVER),
    Field("web_search_options", "refused", CHAT, "This server does not search the web."),
    Field("moderation", "refused", BOTH + RESPONSES, "This server does not moderate."),
    Field("suffix", "refused", TEXT, "Only models trained to fill in the middle support it.", ("",)),
    Field("chat_template", "refused", CHAT + TOKENIZE, "Templates of clients are not run; the model's own template is used."),
    Field("add_special_tokens", "refused", CHAT, "The chat template writes them where they belong.", (False,)),
    Field("allowed_token_ids", "refused", ALL, "Use logit_bias.", ([],)),
    Field("bad_words", "refused", ALL, "Use logit_bias with -100 for single tokens.", ([],)),
    Field("documents", "refused", CHAT, "Put them into the messages, or into chat_template_kwargs.", ([],)),
    Field("prompt_embeds", "refused", TEXT, "Prompts are text or token ids."),
    Field("previous_response_id", "refused", RESPONSES, _MEMORY),
    Field("conversation", "refused", RESPONSES, _MEMORY),
    Field("prompt", "refused", RESPONSES, "Prompt templates are not stored here: send input and instructions."),
    Field("background", "refused", RESPONSES, "Answers are not stored here, so nobody could fetch one later.", (False,)),
    Field("include", "refused", RESPONSES, "There is nothing to include: no hosted tools or stored items, no logprobs.",
          ([], ["reasoning.encrypted_content"])),
    Field("top_logprobs", "refused", RESPONSES, "Use /v1/chat/completions.", (0,)),
    Field("truncation", "refused", RESPONSES, "Use truncate_prompt_tokens.", ("disabled",)),
    Field("max_tool_calls", "refused", RESPONSES, "It is about tools that a server runs. " + _HOSTED),
    Field("thread", "refused", MESSAGES, "Answers are not stored here: send the whole conversation as messages."),
    Field("compaction", "refused", MESSAGES, "This server writes no summaries: ask the model for one in a message."),
    Field("context_management", "refused", DIALECTS, "The whole conversation is sent each time; leave out what is old.", ([],)),
    Field("thinking", "refused", MESSAGES, "Its models do not think apart from answers.",
          ({"type": "disabled"}, *({"type": "adaptive", **display} for display in _DISPLAYS))),
    Field("output_format", "refused", MESSAGES, "It was replaced by output_config.format."),
    Field("mcp_servers", "refused", MESSAGES, _HOSTED, ([],)),
    Field("container", "refused", MESSAGES, "There are no containers here."),
    Field("max_tokens", "refused", RESPONSES, "Its name is max_output_tokens here."),
    Field("max_completion_tokens", "refused", RESPONSES, "Its name is max_output_tokens here."),
    Field("response_format", "refused", RESPONSES, "Its name is text.format here."),
    Field("response_format", "refused", MESSAGES, "Its name is output_config.format here."),
    Field("stop", "refused", MESSAGES, "Its name is stop_sequences here.", ([],)),
    Field("n", "refused", DIALECTS, "There is one answer to a request.", (1,)),
    Field("logprobs", "refused", DIALECTS, "Use /v1/chat/completions.", (False,)),
    Field("use_beam_search", "refused", BOTH, "Beam search is not planned; use n.", (False,)),
)

BY_NAME: dict[Endpoint, dict[str, Field]] = {
    endpoint: {field.name: field for field in FIELDS if endpoint in field.endpoints} for endpoint in ALL + TOKENIZE + DETOKENIZE
}
