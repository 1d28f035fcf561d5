"""What the answers of a request may call, what a grammar has to say about it, and who reads their calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deployments.api.calls import CallReader
from deployments.api.service import Service
from deployments.protocol.errors import bad_request, unsupported
from deployments.protocol.requests import ChatRequest
from deployments.protocol.tools import Toolbox, toolbox
from deployments.tools.grammar import check
from model_core.grammar.spec import MAX_TEXT, GrammarSpec
from model_core.tokenizer.detokenizer import Detokenizer

MAX_CALLS = 32  # in one answer: small models that must call begin the same call again and again


@dataclass(frozen=True)
class CallPlan:
    """grammar: of whole answers, with their calls. either: an answer has calls, or the form that the request asks for."""

    tools: Toolbox
    grammar: GrammarSpec | None = None
    either: bool = False

    def reader(
        self, service: Service, request: ChatRequest, detokenizer: Callable[[frozenset[int]], Detokenizer]
    ) -> CallReader:
        """For one choice. detokenizer: makes one without stop strings that keeps these special tokens."""
        hidden = service.call_tags if request.skip_special_tokens else {}
        parser = service.calls.parser(
            self.tools.names, frozenset(hidden.values()), guided=self.grammar is not None, alone=self.tools.must_call,
            either=self.either,
        )  # fmt: skip
        return CallReader(
            detokenizer(frozenset(service.call_tags)), parser, stop=request.stop, most=MAX_CALLS if self.tools.parallel else 1,
            include_stop=request.include_stop_str_in_output, min_tokens=request.min_tokens,
        )  # fmt: skip


async def plan_calls(service: Service, request: ChatRequest) -> CallPlan | None:
    """None if nothing may be called. Raises ApiError 400, and RequestError for a schema that cannot be enforced."""
    tools = toolbox(request.tools, request.tool_choice, request.parallel_tool_calls)
    if tools is None:
        return None
    answer = None if tools.must_call else request.grammar
    if not tools.must_call and answer is None and not any(function.strict for function in tools.functions):
        return CallPlan(tools)
    if answer is not None and request.structured_outputs is not None and request.structured_outputs.grammar_ is not None:
        words = "Beside a grammar of the client's own no tools can be called: nobody could tell calls from the rest."
        raise unsupported(answer.param, f"{words} Use json, regex or choice, or a tool_choice of 'none' or 'required'.")

    size = sum(len(str(function.parameters)) for function in tools.functions)
    if size > MAX_TEXT:
        raise bad_request(f"The schemas in 'tools' have {size} characters; a grammar can be made of {MAX_TEXT}.", param="tools")

    def make() -> GrammarSpec:
        for i, tool in enumerate(request.tools):
            if tool.function.name in tools.names:
                check(tool.function, f"tools[{i}]")
        form, functions, control = service.calls.form, tools.functions, service.control
        if answer is not None:
            return form.beside(answer, functions, several=tools.parallel, control=control)
        return (form.forced if tools.must_call else form.free)(functions, several=tools.parallel, control=control)

    return CallPlan(tools, await service.text_work(size, make), answer is not None)
