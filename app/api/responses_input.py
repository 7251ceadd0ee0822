"""The input items of a stored response, as it was sent: read from the request's own JSON when they are asked for.

Items get ids of this server's, whatever they came with: the same ones each time, none of them twice.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Literal

import msgspec

from app.api.schemas.decode import shown
from app.api.schemas.responses import FunctionCall, InputItem, InputPart, OutputText, ReasoningPart
from app.api.schemas.responses_input import (
    GivenItem,
    GivenMessage,
    GivenOutput,
    GivenReasoning,
    GivenRefusal,
    GivenSummary,
    GivenText,
    InputItemList,
)
from app.core.errors import InvalidRequest

_PREFIXES = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_INDEX = re.compile(r"[0-9a-f]{8}\Z")
_decode = msgspec.json.Decoder(str | list[InputItem]).decode


def list_items(
    response_id: str, sent: bytes, *, order: Literal["asc", "desc"], limit: int, after: str | None
) -> InputItemList:
    """A page of what was sent as `input`, as JSON. Raises InvalidRequest where `after` is none of its items."""
    given = _decode(sent)
    items = [InputItem(role="user", content=given)] if isinstance(given, str) else given
    digest = sha256(response_id.encode()).hexdigest()[:24]
    order_of = range(len(items)) if order == "asc" else range(len(items) - 1, -1, -1)
    begin = 0 if after is None else 1 + _place_of(after, digest, items, order_of)
    page = [(_item_id(digest, index, items[index]), items[index]) for index in order_of[begin : begin + limit]]
    return InputItemList(
        data=[_shown_item(item_id, item) for item_id, item in page],
        first_id=page[0][0] if page else None,
        last_id=page[-1][0] if page else None,
        has_more=begin + limit < len(items),
    )


def _place_of(item_id: str, digest: str, items: Sequence[InputItem], order: range) -> int:
    """Where in the order the item stands."""
    index = int(item_id[-8:], 16) if _INDEX.search(item_id) else len(items)
    if index >= len(items) or item_id != _item_id(digest, index, items[index]):
        raise InvalidRequest(f"`after` is `{shown(item_id)}`, which is no item of this response.", param="after")
    return order.index(index)


def _item_id(digest: str, index: int, item: InputItem) -> str:
    return f"{_PREFIXES.get(item.type or 'message', 'msg')}_{digest}{index:08x}"


def _shown_item(item_id: str, item: InputItem) -> GivenItem:
    """What was taken once: each kind has what it needs."""
    match item.type:
        case "function_call":
            assert item.call_id is not None and item.name is not None and item.arguments is not None
            return FunctionCall(
                id=item_id, call_id=item.call_id, name=item.name, arguments=item.arguments, status="completed"
            )
        case "function_call_output":
            assert item.call_id is not None and item.output is not None
            output = item.output if isinstance(item.output, str) else [GivenText(text=_text(p)) for p in item.output]
            return GivenOutput(id=item_id, call_id=item.call_id, output=output)
        case "reasoning":
            return GivenReasoning(
                id=item_id,
                summary=[GivenSummary(text=_text(part)) for part in item.summary or ()],
                content=[ReasoningPart(text=_text(part)) for part in _parts(item.content)],
            )
        case _:
            assert item.role is not None
            kind = OutputText if item.role == "assistant" else GivenText
            content = [_shown_part(part, kind) for part in _parts(item.content)]
            return GivenMessage(id=item_id, role=item.role, content=content)


def _shown_part(part: InputPart, kind: type[OutputText] | type[GivenText]) -> GivenText | OutputText | GivenRefusal:
    if part.type == "refusal" and kind is OutputText:
        return GivenRefusal(refusal=_text(part))
    return kind(text=_text(part))


def _parts(content: str | Sequence[InputPart] | None) -> Sequence[InputPart]:
    return [InputPart(type="input_text", text=content)] if isinstance(content, str) else content or ()


def _text(part: InputPart) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    return text or ""
