"""From messages to a prompt: what of them is text, how the template is called, what it may be told.

Invariants: the template is the operator's; a client's variables reach it only where it reads them and the
server does not set them; rendering runs in a thread.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from app.api.deps import ServerContext
from app.api.reasoning import plan_reasoning
from app.api.schemas.chat import ChatMessage, ChatRequest, ContentPart, TemplateValue
from app.api.schemas.decode import decode_value, shown
from app.api.schemas.field_rules import UnknownFields
from app.api.translate import (
    PreparedGeneration,
    check_token_fields,
    encode_prompts,
    fit_prompt,
    prepare_sequences,
)
from app.core.errors import InvalidRequest
from app.core.types import EngineLimits, Grammar
from app.text.chat_template import ChatTemplate

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class Conversation(Protocol):
    """What of a request decides its prompt."""

    @property
    def messages(self) -> list[ChatMessage]: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, TemplateValue] | None: ...


@dataclass(frozen=True, slots=True)
class TemplateVariables:
    """A client's variables, sorted."""

    passed: dict[str, TemplateValue]
    ignored: tuple[str, ...]
    """Fields without effect, as `Headwater-Ignored` names them."""


async def prepare_chat(
    request: ChatRequest,
    rendered: str,
    context: ServerContext,
    *,
    limits: EngineLimits,
    tenant: str = "",
    forced: Grammar | None = None,
    continued: str = "",
) -> PreparedGeneration:
    """The rendered prompt as sequences. Raises InvalidRequest.

    `forced` is the grammar of tool calls, `continued` the text of the message that the prompt goes on with.
    """
    check_token_fields(request, limits)
    (token_ids,) = await encode_prompts(
        [rendered],
        request,
        context.tokenizer,
        limits,
        field="messages",
        add_special_tokens=bool(request.add_special_tokens),
    )
    prompt = fit_prompt(token_ids, request, limits, where="messages", text=rendered)
    is_split = request.separate_reasoning is not False
    shows_special = request.skip_special_tokens is False
    reasoning = plan_reasoning(context, rendered, continued=continued, is_split=is_split, shows_special=shows_special)
    return await prepare_sequences(
        request, [prompt], context, limits=limits, tenant=tenant, forced=forced, reasoning=reasoning
    )


def sort_variables(request: ChatRequest, template: ChatTemplate, *, unknown: UnknownFields) -> TemplateVariables:
    """Which of the client's variables the template reads. Raises InvalidRequest where others are refused."""
    variables = check_kwargs(request.chat_template_kwargs, template, unknown=unknown)
    effort = request.reasoning_effort
    if effort is None:
        return variables
    switch = "enable_thinking"
    if effort == "none" and switch in template.variables and switch not in variables.passed:
        return TemplateVariables({switch: False, **variables.passed}, variables.ignored)
    if "reasoning_effort" not in template.variables:
        return TemplateVariables(variables.passed, (*variables.ignored, "reasoning_effort"))
    return TemplateVariables({"reasoning_effort": effort, **variables.passed}, variables.ignored)


def check_kwargs(
    kwargs: Mapping[str, TemplateValue] | None, template: ChatTemplate, *, unknown: UnknownFields
) -> TemplateVariables:
    """The same for `chat_template_kwargs` alone."""
    given = {} if kwargs is None else kwargs
    passed = {name: value for name, value in given.items() if name in template.variables}
    others = [f"chat_template_kwargs.{name}" for name in given if name not in passed]
    if others and unknown is UnknownFields.REFUSE:
        known = ", ".join(sorted(template.variables)) or "none"
        field = shown(others[0])
        raise InvalidRequest(
            f"`{field}`: the model's chat template does not read it, or the server sets it. It reads: {known}.",
            param=field,
            code="unknown_field",
        )
    return TemplateVariables(passed, tuple(others))


async def render(
    conversation: Conversation,
    raw_messages: msgspec.Raw,
    context: ServerContext,
    *,
    variables: TemplateVariables,
    raw_tools: msgspec.Raw | None = None,
) -> str:
    """The prompt's text, made in a thread. The raw fields are as the client sent them. Raises InvalidRequest."""
    return await asyncio.to_thread(
        _render, conversation, raw_messages, context, variables=variables, raw_tools=raw_tools
    )


def _render(
    conversation: Conversation,
    raw_messages: msgspec.Raw,
    context: ServerContext,
    *,
    variables: TemplateVariables,
    raw_tools: msgspec.Raw | None,
) -> str:
    template = require_template(context)
    continues = bool(conversation.continue_final_message)
    generates = not continues if conversation.add_generation_prompt is None else conversation.add_generation_prompt
    texts = [_content_text(one, index, context) for index, one in enumerate(conversation.messages)]
    return template.render(
        _template_messages(raw_messages, texts, template),
        add_generation_prompt=generates,
        continue_final_message=continues,
        tools=None if raw_tools is None else _template_tools(raw_tools),
        **variables.passed,
    )


def require_template(context: ServerContext) -> ChatTemplate:
    """The server's chat template. Raises InvalidRequest where it has none."""
    if context.chat_template is None:
        raise InvalidRequest(
            f"The model {context.model_names[0]} has no chat template, so it takes no messages. Send text to "
            "/v1/completions, or have the server started with --chat-template FILE.",
            param="messages",
            code="no_chat_template",
        )
    return context.chat_template


def message_text(message: ChatMessage) -> str:
    """The text of a message whose parts are known to be text."""
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join([part.refusal or "" if part.type == "refusal" else part.text or "" for part in content])


def _content_text(message: ChatMessage, index: int, context: ServerContext) -> str:
    if isinstance(message.content, list):
        for number, part in enumerate(message.content):
            _check_part(part, f"messages[{index}].content[{number}]", context)
    return message_text(message)


def _check_part(part: ContentPart, where: str, context: ServerContext) -> None:
    if part.type == "refusal" or part.type in _TEXT_PARTS:
        field = "refusal" if part.type == "refusal" else "text"
        if getattr(part, field) is None:
            raise InvalidRequest(f"`{where}.{field}` is required in a part of type {part.type}.", param=where)
        return
    raise InvalidRequest(
        f"`{where}` is of type {shown(part.type)}; the model {context.model_names[0]} reads text only. "
        "Send parts of type text.",
        param=where,
        code="unsupported_content",
    )


def _template_messages(raw: msgspec.Raw, texts: Sequence[str], template: ChatTemplate) -> list[dict[str, object]]:
    """The messages as templates read them: text content, arguments of tool calls as objects."""
    values = decode_value(raw)
    assert isinstance(values, list)
    messages: list[dict[str, object]] = []
    for value, text in zip(values, texts, strict=True):
        message = {**value, "content": text}
        if message["role"] == "developer" and not template.knows_developer:
            message["role"] = "system"
        if message.get("tool_calls") is not None:
            message["tool_calls"] = _with_parsed_arguments(message["tool_calls"])
        messages.append(message)
    return messages


def _template_tools(raw: msgspec.Raw) -> list[dict[str, object]]:
    values = decode_value(raw)
    assert isinstance(values, list)
    return values


def _with_parsed_arguments(calls: object) -> object:
    """OpenAI sends arguments as a string of JSON, templates write them as an object. Anything else stays as it is."""
    if not isinstance(calls, list):
        return calls
    return [with_parsed_call(call) for call in calls]


def with_parsed_call(call: object) -> object:
    """A tool call with its arguments as an object, where they are the text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        parsed = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call
