"""The pages of docs/reference that say what becomes of each request field.

`python -m app.api.schemas.reference NAME` prints one, NAME being a key of `PAGES`; a test holds the
committed ones to it.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from app.api.schemas.field_rules import FieldTable
from app.api.schemas.fields import CHAT, COMPLETIONS, MESSAGES, RESPONSES


class Page(NamedTuple):
    """One endpoint's page."""

    route: str
    table: FieldTable
    notes: str
    """What the table of honoured fields does not say."""


def reference_page(page: Page) -> str:
    """The Markdown of one page."""
    table = page.table
    harmless = [(one.name, one.accepted, one.meaning) for one in table.harmless]
    refused = [(one.name, one.instead) for one in table.refused]
    return _PAGE.format(
        name=next(name for name, one in PAGES.items() if one is page),
        route=page.route,
        notes=page.notes,
        honoured=_table(("field", "default", "values", "meaning"), table.honoured),
        harmless=_table(("field", "accepted values", "why"), harmless),
        refused=_table(("field", "what to do"), refused),
        unknown=table.unknown.value,
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join([f"`{row[0]}`", *(str(cell) for cell in row[1:])]) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


_PAGE = """\
# POST {route}: every field

This page is generated from `app/api/schemas/fields.py` (`python -m app.api.schemas.reference {name}`).

Each field is honoured, harmless or refused; `null` means "not given". What is refused is a 400 that
names the field in `error.param`, before anything is computed.

## Honoured

{honoured}

{notes}
**Bounds**: a body has at most 256 fields, known or not, and `--max-body-size` bytes (2 MiB). The sequences of a request
carry at most 4,000,000 token ids together: each its prompt, and the ids in its parameters.

## Harmless

Accepted with these values and named in the response header `Headwater-Ignored`. Other values are refused.

{harmless}

## Refused

{refused}

## Unknown

What happens to any other field is decided by `--unknown-fields`: `refuse` makes it a 400, `report` ignores
it and names it in `Headwater-Ignored`. This route's default is `{unknown}`. Refused fields stay refused.
"""

_SEEDS = """\
Sample 0 of a prompt uses the seed itself. Sample i > 0 uses the first 8 bytes, little-endian, of
BLAKE2b-64 over the seed and i, each as 8 little-endian bytes: the tokens of a sample depend neither on
`n` nor on the other prompts of the request. A seed that the server draws has 53 bits, so that every JSON
reader keeps it whole.
"""

_FORMS = """\
**The form of the output**: `response_format` is `{"type": "json_object"}` or
`{"type": "json_schema", "json_schema": {"schema": ...}}`; `structured_outputs` is `{"json": schema}`,
`{"json_object": true}`, `{"regex": ...}`, `{"choice": [...]}` or `{"grammar": ...}` (Lark, or llama.cpp's GBNF).
An answer that finishes with "stop" and no `stop_reason` has the form. One that finishes with "length", or by `stop`
or `stop_token_ids` (`stop_reason` says which), is cut. Tokens of `stop_token_ids` can be drawn only where the form
allows their text. `ignore_eos` ends the output where the form allows nothing more, not where it may end. What cannot
be compiled within the limits is a 400. So are parameters that together leave no token to draw (`output_impossible`);
where that shows in the middle of a stream, it is an event there, before `[DONE]`.
"""

_COMPLETION_NOTES = f"""\
{_SEEDS}
{_FORMS}
`text_offset` counts characters of the text from its start, the echoed prompt included. A token that
begins inside a character has that character's offset.

`usage.prompt_tokens` counts each prompt once, `completion_tokens` the output of all samples, an end token
included. What a model made beyond a stop string is not counted.
"""

_CHAT_NOTES = f"""\
{_SEEDS}
{_FORMS}
**Messages** have a `role` (system, developer, user, assistant, tool, function) and `content`: a string,
null, or a list of parts. Parts of the types `text`, `input_text`, `output_text` and `refusal` are text, joined
by line breaks; an image, sound or file is a 400, since the model reads text. All other fields of a message
reach the template as they are. `arguments` of an earlier tool call are parsed where they are a JSON object,
and passed on as they are where they are not. A template that does not know the role `developer` gets `system`.

**The template** is the model's own or the operator's (`--chat-template`), never the client's. Its text is
encoded as it stands: names of special tokens in a message become these tokens, as in transformers.

**`chat_template_kwargs`** may set what the template reads and the server does not set itself, to a string,
a number, a boolean or null; `enable_thinking` is the best known. A name that the template does not read has
no effect: it is treated as an unknown field, `chat_template_kwargs.NAME`.

**Tools** are `{{"type": "function", "function": {{"name": ..., "description": ..., "parameters": schema}}}}`.
With `tool_choice` auto the template shows them to the model, which may call them; a template that does not read
`tools` makes that a 400. Calls are found in the text in the form of Hermes and Qwen (`<tool_call>`) and as bare JSON
(Llama, Mistral); their arguments are passed on as the model wrote them. With required, or the name of a function,
a grammar holds the output to calls whose arguments match the tool's schema (one of a named function, else up to 8),
so that they parse unless the answer finishes with "length"; `stop` and `stop_token_ids` beside it are a 400. This needs
no template that reads tools, but a model that was not shown a tool knows nothing of it beyond its schema's words. With
none the tools are not shown. A schema must be of an object.
`response_format` beside tools that the model may call holds the output to that form or to calls whose arguments match;
where the model's calls are bare JSON it is a 400, as is `structured_outputs` beside tools unless `tool_choice` is
none. An answer with calls finishes with "tool_calls".

**Reasoning**: where the chat template speaks of `<think>` tags (or `--reasoning-parser` says so), what the model writes
between them, before its answer, is sent as `reasoning_content` and, the same, as `reasoning`; `content` is the answer.
Whether an output begins inside is told by the end of the prompt. White space at the ends of both is dropped.
`include_reasoning` false leaves the reasoning out, `separate_reasoning` false leaves it in `content`, tags and all.
`reasoning_effort` reaches a template that reads it; none also sets `enable_thinking` to false where the template has
that. A form of the output, and calls that must be made, begin behind the reasoning. Calls are looked for in the answer
alone. Stop strings end the reasoning, too. `logprobs` and `token_ids` are of all tokens;
`usage.completion_tokens_details.reasoning_tokens` counts those up to the end of the reasoning, its tags included.

**Log-probabilities** show a token that is part of a character as `bytes:\\xe4\\xbd`; `bytes` is exact.

`usage` counts the template's tokens too, and an end token. What a model made beyond a stop string is not counted.
"""

_MESSAGES_NOTES = """\
**Messages** have the role user, assistant or system, and `content`: a string or a list of blocks. Blocks of the type
`text` are text, joined by line breaks; `tool_use`, `tool_result` and `thinking` reach the model's template as it
knows them (results as messages of the role tool; `is_error` has no words of its own). Any other block, an image
above all, is a 400. Messages of one role in a row are one turn. A final message of the assistant is gone on with.
`cache_control` may stand anywhere.

**Tools** have `name`, `description` and `input_schema`, a schema of an object; the tools that Anthropic runs itself
are a 400. `tool_choice` any and tool hold the output to calls whose input matches the schema; auto needs a template
that reads tools, as on [chat](chat.md). Where the model wrote a call whose input is no JSON object, or was cut in
it, the answer has it as text.

**Thinking**: what a model writes between `<think>` tags before its answer (see Reasoning on [chat](chat.md)) is a block
of type `thinking`, with an empty signature. `thinking` enabled and disabled set `enable_thinking` where the template
reads it; with disabled no such block is sent, whatever the model does. A budget has no effect: `max_tokens` bounds all.
Where the server knows of no reasoning, anything but disabled is a 400.

**The answer**: `stop_reason` is end_turn, max_tokens, model_context_window_exceeded (the context ended first),
stop_sequence or tool_use. `usage.input_tokens` are those that no cache had; `cache_read_input_tokens` the others.
Errors have Anthropic's form. `x-api-key` and `Authorization` both carry keys; `anthropic-version` and
`anthropic-beta` are not looked at.

**`/v1/messages/count_tokens`** takes `model`, `messages`, `system`, `tools`, `tool_choice` and `thinking`, with
the same meaning.
"""

_RESPONSES_NOTES = """\
**Items** of `input` are messages (`role` user, assistant, system or developer; `content` a string or a list of parts),
`function_call`, `function_call_output` and `reasoning`. Parts of the types `input_text`, `output_text`,
`reasoning_text`, `summary_text` and `refusal` are text, joined by line breaks; an image or file is a 400, as is any
other kind of item. A message of the assistant, its calls and the reasoning before them reach the model's template as
one turn, results of calls as messages of the role tool. A template that does not know the role `developer` gets
`system`. A new message is always begun: none is gone on with.

**Stored responses** can be read (`GET /v1/responses/{id}`), forgotten (`DELETE`) and gone on with
(`previous_response_id`); `GET /v1/responses/{id}/input_items` lists what their own request sent, `limit` items from the
end (`order`, `after`). None can be cancelled (`POST .../cancel` is a 400): there are no background responses, and one
that runs ends with its connection. They are kept in the server's memory, up to `--max-stored-responses` and 64 MiB:
where that is full, the key that holds most gives up its oldest, and a restart forgets all. With API keys, a response is
there for its own key alone. An id that is not there is a 400 (`previous_response_not_found`), or a 404 where it is
read. Instructions are of one response and do not carry over. A response that failed or whose client went away is not
stored. What was gone on from a deleted response keeps its conversation.

**The form of the output**: `text.format` is `{"type": "json_object"}` or
`{"type": "json_schema", "name": ..., "schema": ...}`. An answer with the status completed has the form.

**Tools** are `{"type": "function", "name": ..., "description": ..., "parameters": schema}`; the tools that OpenAI runs
itself are a 400. `tool_choice` has the same meaning as on [chat](chat.md), and the same limits.

**The answer** has the items `reasoning`, `message` and `function_call`, in the order of the text. Its status is
completed; incomplete where `max_output_tokens` or the context ended it (`incomplete_details.reason` is
max_output_tokens for both); failed, in a stream. `usage.input_tokens` counts the template's tokens too.

**A stream** ends with response.completed, response.incomplete or response.failed; there is no `[DONE]`. A failure
after the first byte is an event `error` and response.failed.

**Reasoning** is told from the answer as on [chat](chat.md), and is an item of its own, its text in `content`. There is
no summary, and nothing is encrypted. `reasoning.effort` means what `reasoning_effort` means there.
"""

PAGES: Mapping[str, Page] = MappingProxyType(
    {
        "completions": Page("/v1/completions", COMPLETIONS, _COMPLETION_NOTES),
        "chat": Page("/v1/chat/completions", CHAT, _CHAT_NOTES),
        "responses": Page("/v1/responses", RESPONSES, _RESPONSES_NOTES),
        "messages": Page("/v1/messages", MESSAGES, _MESSAGES_NOTES),
    }
)


def main(names: Sequence[str]) -> None:
    """Print these pages."""
    for name in names:
        sys.stdout.write(reference_page(PAGES[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
