"""From a request for a response to what chat templates read, and from its fields to those of chat.

A message, a call and the reasoning before them are one turn of the assistant, as templates know it; results of
calls become messages of the role tool. Instructions come first, before the conversation that is gone on with, and
are no part of what is stored.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from app.api.chat_prompt import TemplateVariables, require_template, sort_variables, with_parsed_call
from app.api.deps import ServerContext
from app.api.responses_store import Message
from app.api.schemas.chat import ChatRequest
from app.api.schemas.decode import shown
from app.api.schemas.field_rules import UnknownFields
from app.api.schemas.responses import (
    FlatSchemaFormat,
    InputItem,
    InputPart,
    NamedFunction,
    OutputItem,
    OutputMessage,
    ReasoningItem,
    ResponsesRequest,
    ResponseTool,
)
from app.api.schemas.structured import JsonSchemaFormat, JsonSchemaSpec, ResponseFormat
from app.api.schemas.tools import FunctionChoice, FunctionSpec, NamedToolChoice, Tool, ToolChoice
from app.api.tools import ToolPlan, plan_tools
from app.api.turn import Turn
from app.core.errors import InvalidRequest

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "reasoning_text", "summary_text"})
_SAME_FIELDS = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "cache_salt"),
    "parallel_tool_calls",
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "chat_template_kwargs", "logit_bias", "priority"),
)
_OTHER_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}
"""What fields of chat are called here."""


@dataclass(frozen=True, slots=True)
class ResponsesPrompt:
    """A rendered conversation, and how its tools are served."""

    text: str
    new_messages: list[Message]
    """What the request adds to the conversation."""
    plan: ToolPlan | None
    request: ChatRequest
    """The request's fields under the names of chat, without its messages."""
    ignored: tuple[str, ...]
    """Fields without effect."""


async def render_response(
    request: ResponsesRequest,
    conversation: Sequence[Message],
    context: ServerContext,
    *,
    num_tool_bytes: int,
    unknown: UnknownFields,
) -> ResponsesPrompt:
    """The prompt of a response to `conversation` and the input, made in a thread. Raises InvalidRequest."""
    return await asyncio.to_thread(
        _render, request, conversation, context, num_tool_bytes=num_tool_bytes, unknown=unknown
    )


def _render(
    request: ResponsesRequest,
    conversation: Sequence[Message],
    context: ServerContext,
    *,
    num_tool_bytes: int,
    unknown: UnknownFields,
) -> ResponsesPrompt:
    template = require_template(context)
    chat = _chat_request(request)
    plan = plan_tools(chat, template, num_bytes=num_tool_bytes, schema_field="parameters")
    variables = sort_variables(chat, template, unknown=unknown)
    turns = Turns(conversation, model=context.model_names[0], knows_developer=template.knows_developer)
    new_messages = turns.of_input(request.input)
    instructions: list[Message] = []
    if request.instructions is not None:
        instructions.append({"role": "system", "content": request.instructions})
    text = template.render(
        [*instructions, *conversation, *new_messages],
        add_generation_prompt=True,
        continue_final_message=False,
        tools=None if plan is None else [_template_tool(tool) for tool in request.tools or ()],
        **variables.passed,
    )
    return ResponsesPrompt(text, new_messages, plan, chat, _ignored(request, variables))


@contextmanager
def fields_renamed() -> Iterator[None]:
    """Errors that name a field of chat name that of this endpoint."""
    try:
        yield
    except InvalidRequest as error:
        message, param = error.message.replace(", or set `truncate_prompt_tokens`", ""), error.param
        for name, ours in _OTHER_NAMES.items():
            message = message.replace(f"`{name}`", f"`{ours}`")
        raise InvalidRequest(
            message, param=None if param is None else _OTHER_NAMES.get(param, param), code=error.code
        ) from error


def _chat_request(request: ResponsesRequest) -> ChatRequest:
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
        if request.stream_options.include_obfuscation:
            raise InvalidRequest(
                "`stream_options.include_obfuscation` is not served: events are not padded. Leave it out.",
                param="stream_options.include_obfuscation",
            )
    return ChatRequest(
        messages=[],  # rendered from the items themselves
        max_tokens=request.max_output_tokens,
        logprobs=True if request.wants_logprobs else None,
        top_logprobs=request.top_logprobs if request.wants_logprobs else None,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        response_format=_response_format(request),
        tools=[_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())] or None,
        tool_choice=_chat_choice(request),
        **{name: getattr(request, name) for name in _SAME_FIELDS},
    )


def _response_format(request: ResponsesRequest) -> ResponseFormat | None:
    form = None if request.text is None else request.text.format
    if isinstance(form, FlatSchemaFormat):
        return JsonSchemaFormat(json_schema=JsonSchemaSpec(schema=form.schema, name=form.name))
    return form


def _chat_choice(request: ResponsesRequest) -> ToolChoice | None:
    choice = request.tool_choice
    if not isinstance(choice, NamedFunction):
        return choice
    if choice.type != "function" or choice.name is None:
        raise InvalidRequest(
            f"`tool_choice` of type {shown(choice.type)} is not served: send none, auto, required, or "
            '{"type": "function", "name": ...}.',
            param="tool_choice",
        )
    return NamedToolChoice(type="function", function=FunctionChoice(name=choice.name))


def _chat_tool(tool: ResponseTool, where: str) -> Tool:
    if tool.type != "function":
        raise InvalidRequest(
            f"`{where}` is of type {shown(tool.type)}, which this server does not run: it serves tools of type "
            "function, which the client runs.",
            param=where,
            code="unsupported_tool",
        )
    if tool.name is None:
        raise InvalidRequest(f"`{where}.name` is required.", param=f"{where}.name")
    spec = FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters)
    return Tool(type="function", function=spec)


def _template_tool(tool: ResponseTool) -> dict[str, object]:
    given = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


def _ignored(request: ResponsesRequest, variables: TemplateVariables) -> tuple[str, ...]:
    names = ["reasoning.effort" if name == "reasoning_effort" else name for name in variables.ignored]
    if request.reasoning is not None:
        summaries = ("summary", "generate_summary")
        names += [f"reasoning.{name}" for name in summaries if getattr(request.reasoning, name) is not None]
    return tuple(names)


class Turns:
    """The messages that items make, after those of a conversation."""

    def __init__(self, conversation: Sequence[Message], *, model: str, knows_developer: bool) -> None:
        self._model = model
        self._knows_developer = knows_developer
        self._messages: list[Message] = []
        self._turn = Turn()
        self._names = dict(_names_of_calls(conversation))
        """Of the functions, by the ids of their calls."""

    def of_input(self, items: str | Sequence[InputItem]) -> list[Message]:
        """The messages of a request's input. Raises InvalidRequest for what is not served."""
        if isinstance(items, str):
            return [{"role": "user", "content": items}]
        for index, item in enumerate(items):
            self._add(item, f"input[{index}]")
        return self._end()

    def of_output(self, items: Sequence[OutputItem]) -> list[Message]:
        """The messages of an answer."""
        for item in items:
            if isinstance(item, OutputMessage):
                self._add_text("".join(part.text for part in item.content))
            elif isinstance(item, ReasoningItem):
                self._add_thought("".join(part.text for part in item.content))
            else:
                self._add_call(item.call_id, item.name, item.arguments)
        return self._end()

    def _end(self) -> list[Message]:
        self._flush()
        return self._messages

    def _add(self, item: InputItem, where: str) -> None:
        match item.type:
            case None | "message":
                self._add_message(item, where)
            case "function_call":
                if item.call_id is None or item.name is None or item.arguments is None:
                    raise _missing(where, "a function_call needs `call_id`, `name` and `arguments`")
                self._add_call(item.call_id, item.name, item.arguments)
            case "function_call_output":
                self._add_output(item, where)
            case "reasoning":
                self._add_thought(self._reasoning_of(item, where))
            case _:
                raise InvalidRequest(
                    f"`{where}` is of type {shown(item.type)}, which is not served; this server takes message, "
                    "function_call, function_call_output and reasoning.",
                    param=where,
                    code="unsupported_item",
                )

    def _add_message(self, item: InputItem, where: str) -> None:
        if item.role is None or item.content is None:
            raise _missing(where, "a message needs `role` and `content`")
        text = self._text(item.content, f"{where}.content")
        if item.role == "assistant":
            self._add_text(text)
            return
        self._flush()
        is_unknown = item.role == "developer" and not self._knows_developer
        self._messages.append({"role": "system" if is_unknown else item.role, "content": text})

    def _add_text(self, text: str) -> None:
        if self._turn.calls:
            self._flush()
        self._turn.texts.append(text)

    def _add_thought(self, text: str) -> None:
        if self._turn.texts or self._turn.calls:
            self._flush()
        if text:
            self._turn.thoughts.append(text)

    def _add_call(self, call_id: str, name: str, arguments: str) -> None:
        self._names[call_id] = name
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn.calls.append(with_parsed_call(call))

    def _add_output(self, item: InputItem, where: str) -> None:
        if item.call_id is None or item.output is None:
            raise _missing(where, "a function_call_output needs `call_id` and `output`")
        self._flush()
        result: Message = {"role": "tool", "content": self._text(item.output, f"{where}.output")}
        result["tool_call_id"] = item.call_id
        if item.call_id in self._names:
            result["name"] = self._names[item.call_id]
        self._messages.append(result)

    def _reasoning_of(self, item: InputItem, where: str) -> str:
        content = item.content or item.summary or []
        return self._text(content, f"{where}.content")

    def _flush(self) -> None:
        turn = self._turn
        if turn.texts or turn.thoughts or turn.calls:
            self._messages.append(turn.message("assistant"))
        self._turn = Turn()

    def _text(self, content: str | Sequence[InputPart], where: str) -> str:
        if isinstance(content, str):
            return content
        return "\n".join([self._part(part, f"{where}[{index}]") for index, part in enumerate(content)])

    def _part(self, part: InputPart, where: str) -> str:
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
        if text is not None:
            return text
        if part.type == "refusal" or part.type in _TEXT_PARTS:
            raise _missing(where, f"a part of type {part.type} needs its text")
        raise InvalidRequest(
            f"`{where}` is of type {shown(part.type)}; the model {self._model} reads text only. "
            "Send parts of type input_text.",
            param=where,
            code="unsupported_content",
        )


def _names_of_calls(conversation: Sequence[Message]) -> Iterator[tuple[str, str]]:
    for message in conversation:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            yield call["id"], call["function"]["name"]


def _missing(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"`{where}`: {what}.", param=where)
