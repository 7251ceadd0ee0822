"""From `tools` and `tool_choice` to what they ask of a prompt, of the grammar and of the answer's text.

Calls that the model may make are shown to it by its template. Calls that it must make are held to the tools'
schemas by a grammar in the form that its template uses, so that their arguments always parse.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from app.api.constraint import format_schema
from app.api.schemas.chat import ChatRequest
from app.api.schemas.limits import MAX_TOOLS_BYTES
from app.api.schemas.tools import NamedToolChoice, Tool
from app.api.sequence_text import Delta
from app.core.errors import InvalidRequest
from app.core.types import Grammar
from app.grammar import source
from app.grammar.errors import GrammarError
from app.text.chat_template import ChatTemplate
from app.text.tools import CallForm, ToolParser, ToolStep, call_frame

_SEPARATOR = "\n"


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How the tools of one request are served."""

    names: frozenset[str]
    """Those whose calls may be bare JSON."""
    single: bool
    """At most one call."""
    grammar: Grammar | None
    """Where calls are forced."""


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """One whole call."""

    id: str
    name: str
    arguments: str


class ToolText:
    """The text and the calls of one sequence. Feed it every delta, in order."""

    def __init__(self, plan: ToolPlan, *, id_prefix: str = "call_", id_key: str | None = None) -> None:
        """`id_key`: what the calls' ids follow from where another server must give the same; else they are drawn."""
        self._parser = ToolParser(plan.names, single=plan.single)
        self._id_prefix = id_prefix
        self._id_key = id_key
        self._ids: list[str] = []

    @property
    def has_calls(self) -> bool:
        """Whether a call was found, if only its beginning."""
        return self._parser.has_calls

    def feed(self, delta: Delta) -> ToolStep:
        """What this delta brought."""
        step = self._parser.push(delta.text)
        if delta.finish_reason is None:
            return step
        last = self._parser.finish()
        # The end brings calls only where it gives text back, which began behind all that is in `step`.
        return ToolStep(step.text + last.text, (*step.calls, *last.calls))

    def id_of(self, call: int) -> str:
        """Of call 0, 1, ...: made when it is first asked for."""
        while len(self._ids) <= call:
            self._ids.append(self._id_prefix + self._new_id())
        return self._ids[call]

    def _new_id(self) -> str:
        if self._id_key is None:
            return secrets.token_hex(12)
        return blake2b(f"{self._id_key}/{len(self._ids)}".encode(), digest_size=12).hexdigest()

    def whole(self, deltas: Iterable[Delta]) -> tuple[str, list[WrittenCall]]:
        """All text, and all calls, of all deltas at once."""
        text: list[str] = []
        names: list[str] = []
        arguments: list[list[str]] = []
        for delta in deltas:
            step = self.feed(delta)
            text.append(step.text)
            for one in step.calls:
                if one.name is not None:
                    names.append(one.name)
                    arguments.append([])
                arguments[one.call].append(one.arguments)
        calls = [
            WrittenCall(self.id_of(call), name, "".join(parts))
            for call, (name, parts) in enumerate(zip(names, arguments, strict=True))
        ]
        return "".join(text), calls


def plan_tools(
    request: ChatRequest, template: ChatTemplate, *, num_bytes: int, schema_field: str = "function.parameters"
) -> ToolPlan | None:
    """How the request's tools are served; None where none may be called. Raises InvalidRequest.

    `num_bytes` is the size of the tools as they were sent, `schema_field` where a tool has its schema.
    """
    tools, choice = request.tools or [], request.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("`tool_choice` asks for a call, and there are no `tools`.", param="tool_choice")
        return None
    _check_tools(tools, num_bytes=num_bytes, schema_field=schema_field)
    if choice == "none":
        return None
    if request.structured_outputs is not None:
        raise InvalidRequest(
            "`structured_outputs` beside `tools` needs `tool_choice` none: the output has that form, or calls.",
            param="structured_outputs",
        )
    if choice in (None, "auto"):
        return _plan_free(request, tools, template)
    chosen = tools
    if isinstance(choice, NamedToolChoice):
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise InvalidRequest("`tool_choice` names a function that is not among the `tools`.", param="tool_choice")
    is_tagged = template.call_form is CallForm.TAGGED
    single = isinstance(choice, NamedToolChoice) or request.parallel_tool_calls is False or not is_tagged
    return ToolPlan(_names(tools), single, _grammar(chosen, template.call_form, single=single))


def _names(tools: Iterable[Tool]) -> frozenset[str]:
    return frozenset(tool.function.name for tool in tools)


def _check_tools(tools: list[Tool], *, num_bytes: int, schema_field: str) -> None:
    if num_bytes > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"`tools` has {num_bytes} bytes, more than {MAX_TOOLS_BYTES}.", param="tools")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name, parameters = tool.function.name, tool.function.parameters
        if name in seen:
            raise InvalidRequest(f"`tools[{index}]` has the name of an earlier one, {name}.", param=f"tools[{index}]")
        seen.add(name)
        if parameters is not None and parameters.get("type", "object") != "object":
            where = f"tools[{index}].{schema_field}"
            raise InvalidRequest(
                f"`{where}`: its `type` must be object, since arguments are one.", param=where, code="invalid_schema"
            )


def _plan_free(request: ChatRequest, tools: list[Tool], template: ChatTemplate) -> ToolPlan:
    """Calls that the model may make; beside a format of the answer, calls or that."""
    _check_template(template)
    single = request.parallel_tool_calls is False
    answer = format_schema(request)
    if answer is None:
        return ToolPlan(_names(tools), single, grammar=None)
    if template.call_form is not CallForm.TAGGED:
        raise InvalidRequest(
            "`response_format` beside `tools` needs `tool_choice` none or required: this model's calls are JSON, too.",
            param="response_format",
        )
    # No names: JSON that is not in a tag is the answer.
    return ToolPlan(frozenset(), single, _grammar(tools, template.call_form, single=single, otherwise=answer))


def _check_template(template: ChatTemplate) -> None:
    if not template.reads_tools:
        raise InvalidRequest(
            "The model's chat template shows it no tools, so it cannot choose one. Set `tool_choice` to required, to "
            "a function, or to none, or have the server started with a --chat-template that reads `tools`.",
            param="tools",
            code="tools_not_supported",
        )


def _grammar(
    tools: list[Tool], form: CallForm, *, single: bool, otherwise: Mapping[str, object] | None = None
) -> Grammar:
    frames: list[source.FramedSchema] = []
    for tool in tools:
        frame = call_frame(form, tool.function.name)
        frames.append(source.FramedSchema(frame.before, _schema(tool.function.parameters), frame.after))
    try:
        return source.framed_json(frames, separator=None if single else _SEPARATOR, otherwise=otherwise)
    except GrammarError as error:
        raise InvalidRequest(f"`tools`: {error}.", param="tools", code="invalid_grammar") from error


def _schema(parameters: Mapping[str, object] | None) -> Mapping[str, object]:
    """A function without parameters takes no arguments."""
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**parameters, "type": "object"}
