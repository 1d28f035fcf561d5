"""What the answers of a request may call, what a grammar has to say about it, and who reads their calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deployments.api.calls import CallReader
from deployments.api.service import Service
from deployments.protocol.errors import bad_request, unsupported
from deployments.protocol.requests import ChatRequest
from deployments.protocol.tools import Toolbox, toolbox
from deployments.tools.grammar import ARRAY, Form, check
from model_core.grammar.spec import MAX_TEXT, GrammarSpec
from model_core.tokenizer.detokenizer import Detokenizer

MAX_CALLS = 32  # in one answer: small models that must call begin the same call again and again


@dataclass(frozen=True)
class CallPlan:
    """form: of the calls that the grammar makes, if there is one."""

    tools: Toolbox
    grammar: GrammarSpec | None = None
    form: Form | None = None

    def reader(
        self, service: Service, request: ChatRequest, detokenizer: Callable[[frozenset[int]], Detokenizer]
    ) -> CallReader:
        """For one choice. detokenizer: makes one without stop strings that keeps these special tokens."""
        hidden = service.call_tags if request.skip_special_tokens else {}
        parser = service.calls.parser(self.tools.names, frozenset(hidden.values()), form=self.form)
        return CallReader(
            detokenizer(frozenset(service.call_tags)), parser, stop=request.stop, most=MAX_CALLS if self.tools.parallel else 1,
            include_stop=request.include_stop_str_in_output, min_tokens=request.min_tokens,
        )  # fmt: skip


async def plan_calls(service: Service, request: ChatRequest) -> CallPlan | None:
    """None if nothing may be called. Raises ApiError 400, and RequestError for a schema that cannot be enforced."""
    tools = toolbox(request.tools, request.tool_choice, request.parallel_tool_calls)
    if tools is None:
        return None
    is_strict = any(function.strict for function in tools.functions)
    if not tools.must_call and not is_strict:
        return CallPlan(tools)
    form = service.calls.own_form(frozenset(service.call_tags.values()))
    if form is None and not tools.must_call:
        words = "Calls in this model's form cannot be strict beside text: leave 'strict' out, or require a call by tool_choice."
        raise unsupported("tools", words)

    size = sum(len(str(function.parameters)) for function in tools.functions)
    if size > MAX_TEXT:
        raise bad_request(f"The schemas in 'tools' have {size} characters; a grammar can be made of {MAX_TEXT}.", param="tools")

    def make() -> GrammarSpec:
        for i, tool in enumerate(request.tools):
            if tool.function.name in tools.names:
                check(tool.function, f"tools[{i}]")
        write = (form or ARRAY).forced if tools.must_call else (form or ARRAY).free
        return write(tools.functions, several=tools.parallel)

    return CallPlan(tools, await service.text_work(size, make), form or ARRAY)
