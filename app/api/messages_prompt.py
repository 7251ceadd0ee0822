"""From Anthropic's messages to what chat templates read, and from a request's fields to those of chat.

Results of tools become messages of the role tool, as templates know them; messages of one role in a row are
one turn, as Anthropic has it. A final message of the assistant is gone on with.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from app.api.chat_prompt import require_template
from app.api.deps import ServerContext
from app.api.schemas.chat import ChatRequest
from app.api.schemas.decode import shown
from app.api.schemas.messages import ContentBlock, CountTokensRequest, MessageParam, MessagesRequest, MessagesTool
from app.api.schemas.tools import FunctionChoice, FunctionSpec, NamedToolChoice, Tool, ToolChoice
from app.api.tools import ToolPlan, plan_tools
from app.api.turn import Turn
from app.core.errors import InvalidRequest
from app.text.chat_template import ChatTemplate


@dataclass(frozen=True, slots=True)
class MessagesPrompt:
    """A rendered conversation, and how its tools are served."""

    text: str
    plan: ToolPlan | None
    request: ChatRequest
    """The request's fields under the names of chat, without its messages."""
    continued: str
    """The text that the prompt goes on with."""
    ignored: tuple[str, ...]
    """Fields without effect."""


async def render_conversation(
    request: CountTokensRequest, context: ServerContext, *, num_tool_bytes: int
) -> MessagesPrompt:
    """The prompt of a conversation, made in a thread. `num_tool_bytes`: of `tools` as sent. Raises InvalidRequest."""
    return await asyncio.to_thread(_render, request, context, num_tool_bytes=num_tool_bytes)


def _render(request: CountTokensRequest, context: ServerContext, *, num_tool_bytes: int) -> MessagesPrompt:
    template = require_template(context)
    chat = _chat_request(request)
    plan = plan_tools(chat, template, num_bytes=num_tool_bytes, schema_field="input_schema")
    if plan is not None and plan.grammar is not None and chat.stop:
        raise InvalidRequest(
            "`stop_sequences` could end a call that `tool_choice` asks for before it is whole: leave one of them out.",
            param="stop_sequences",
        )
    messages = _Turns(context).all_of(request)
    continues = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    text = template.render(
        messages,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        tools=None if plan is None else [_template_tool(tool) for tool in request.tools or ()],
        **_thinking_variables(request, context, template),
    )
    continued = str(messages[-1]["content"]) if continues else ""
    has_budget = request.thinking is not None and request.thinking.budget_tokens is not None
    ignored = ("thinking.budget_tokens",) if has_budget else ()
    return MessagesPrompt(text, plan, chat, continued, ignored)


def _thinking_variables(request: CountTokensRequest, context: ServerContext, template: ChatTemplate) -> dict[str, bool]:
    """What the template is told of thinking, where it reads it. Raises InvalidRequest where none can be asked for."""
    if request.thinking is None:
        return {}
    if request.thinking.type != "disabled" and context.reasoning is None:
        raise InvalidRequest(
            f"`thinking` is accepted as disabled only: the model {context.model_names[0]} does not think apart from "
            "its answer, as far as the server knows; see --reasoning-parser.",
            param="thinking",
        )
    if "enable_thinking" not in template.variables or request.thinking.type == "adaptive":
        return {}
    return {"enable_thinking": request.thinking.type == "enabled"}


def _chat_request(request: CountTokensRequest) -> ChatRequest:
    choice = request.tool_choice
    tools = [_chat_tool(tool) for tool in request.tools] if request.tools else None
    single = choice is not None and choice.disable_parallel_tool_use
    chat = ChatRequest(
        messages=[],  # rendered from Anthropic's own
        model=request.model,
        tools=tools,
        tool_choice=_chat_choice(request),
        parallel_tool_calls=False if single else None,
    )
    if not isinstance(request, MessagesRequest):
        return chat
    sampling = {name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
    return msgspec.structs.replace(chat, stop=request.stop_sequences, **sampling)


def _chat_choice(request: CountTokensRequest) -> ToolChoice | None:
    choice = request.tool_choice
    match None if choice is None else choice.type:
        case None | "auto":
            return None
        case "none":
            return "none"
        case "any":
            return "required"
    assert choice is not None
    if choice.name is None:
        raise InvalidRequest("`tool_choice.name` is required with type tool.", param="tool_choice.name")
    return NamedToolChoice(type="function", function=FunctionChoice(name=choice.name))


def _chat_tool(tool: MessagesTool) -> Tool:
    spec = FunctionSpec(name=tool.name, description=tool.description, parameters=tool.input_schema)
    return Tool(type="function", function=spec)


def _template_tool(tool: MessagesTool) -> dict[str, object]:
    description = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **description, "parameters": tool.input_schema}}


class _Turns:
    """The turns of one conversation, in the making."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._messages: list[dict[str, object]] = []
        self._role = ""
        self._turn = Turn()
        self._names: dict[str, str] = {}
        """Of the tools, by the ids of the calls."""

    def all_of(self, request: CountTokensRequest) -> list[dict[str, object]]:
        """The messages, the system's first."""
        if request.system is not None:
            texts = [self._text(block, where) for block, where in _blocks(request.system, "system")]
            self._messages.append({"role": "system", "content": "\n".join(texts)})
        for index, message in enumerate(request.messages):
            self._add(message, f"messages[{index}].content")
        self._flush()
        return self._messages

    def _add(self, message: MessageParam, where: str) -> None:
        if message.role != self._role:
            self._flush()
            self._role = message.role
        for block, place in _blocks(message.content, where):
            if block.type == "tool_result" and message.role == "user":
                self._add_result(block, place)
            elif block.type == "tool_use" and message.role == "assistant":
                self._add_call(block, place)
            elif block.type == "thinking" and message.role == "assistant":
                self._turn.thoughts.append(block.thinking or "")
            elif block.type != "redacted_thinking":
                self._turn.texts.append(self._text(block, place))

    def _add_result(self, block: ContentBlock, where: str) -> None:
        if block.tool_use_id is None:
            raise InvalidRequest(f"`{where}.tool_use_id` is required in a tool_result block.", param=where)
        if self._turn.texts:
            self._messages.append(self._turn.message("user"))
            self._turn = Turn()
        content = "" if block.content is None else block.content
        texts = [self._text(one, place) for one, place in _blocks(content, f"{where}.content")]
        result: dict[str, object] = {"role": "tool", "content": "\n".join(texts), "tool_call_id": block.tool_use_id}
        if block.tool_use_id in self._names:
            result["name"] = self._names[block.tool_use_id]
        self._messages.append(result)

    def _add_call(self, block: ContentBlock, where: str) -> None:
        if block.name is None or block.id is None:
            raise InvalidRequest(f"`{where}`: a tool_use block needs `id` and `name`.", param=where)
        self._names[block.id] = block.name
        arguments = {} if block.input is None else block.input
        function = {"name": block.name, "arguments": arguments}
        self._turn.calls.append({"id": block.id, "type": "function", "function": function})

    def _flush(self) -> None:
        turn = self._turn
        is_answered = self._role == "user" and bool(self._messages) and self._messages[-1]["role"] == "tool"
        if self._role and (turn.texts or turn.calls or turn.thoughts or not is_answered):
            self._messages.append(turn.message(self._role))
        self._turn = Turn()

    def _text(self, block: ContentBlock, where: str) -> str:
        if block.type == "text":
            if block.text is None:
                raise InvalidRequest(f"`{where}.text` is required in a text block.", param=where)
            return block.text
        raise InvalidRequest(
            f"`{where}` is of type {shown(block.type)}; the model {self._context.model_names[0]} reads text only, and "
            "calls and results of tools have their places. Send blocks of type text.",
            param=where,
            code="unsupported_content",
        )


def _blocks(content: str | list[ContentBlock], where: str) -> Iterable[tuple[ContentBlock, str]]:
    if isinstance(content, str):
        return [(ContentBlock(type="text", text=content), where)]
    return [(block, f"{where}[{index}]") for index, block in enumerate(content)]
