"""Every field of `/v1/completions`: honoured, harmless or refused. The only table that decides it.

- *honoured*: a field of `CompletionRequest`, with an effect.
- *harmless*: accepted where its value says what the server does anyway, or where it is a label without
  effect; named in the response header `Headwater-Ignored`. Any other value is a 400 that names the field.
- *refused*: a 400 that names the field, with what to do instead.

`null` is "not given" everywhere. A field in none of the lists is unknown: `UnknownFields` decides.
`python -m app.api.schemas.fields` prints docs/reference/completions.md; a test holds the page to it.
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

import msgspec

from app.api.schemas.decode import decode_value, shown
from app.core.errors import InvalidRequest

_HEADER_SAFE = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
_MAX_REPORTED = 32


class UnknownFields(StrEnum):
    """What happens to a field that no list names."""

    REFUSE = "refuse"
    REPORT = "report"


class Honoured(NamedTuple):
    """A field with an effect."""

    name: str
    default: str
    range: str
    meaning: str


class Harmless(NamedTuple):
    """A field that may be given where it changes nothing."""

    name: str
    accepts: Callable[[msgspec.Raw, Mapping[str, msgspec.Raw]], bool]
    """Takes the value, undecoded, and all fields of the body."""
    accepted: str
    """The accepted values, in words."""
    meaning: str


class Refused(NamedTuple):
    """A field that other servers know and this one does not serve."""

    name: str
    instead: str
    """What to do, as the end of a sentence."""


def _label(_value: msgspec.Raw, _fields: Mapping[str, msgspec.Raw]) -> bool:
    return True


def _only(*values: object) -> Callable[[msgspec.Raw, Mapping[str, msgspec.Raw]], bool]:
    def accepts(raw: msgspec.Raw, _fields: Mapping[str, msgspec.Raw]) -> bool:
        value = decode_value(raw)
        return any(type(value) is type(one) and value == one for one in values)

    return accepts


def _one_or_n(raw: msgspec.Raw, fields: Mapping[str, msgspec.Raw]) -> bool:
    value = decode_value(raw)
    n = decode_value(fields["n"]) if "n" in fields else 1
    return isinstance(value, int) and not isinstance(value, bool) and value in (1, n)


HONOURED: tuple[Honoured, ...] = (
    Honoured("model", "the served model", "a name of `GET /v1/models`", "Which model; another name is a 404."),
    Honoured("prompt", "required", "string, strings, token ids, or lists of ids; 1,024", "What to go on from."),
    Honoured("max_tokens", "16", "≥ 0; 0 with `echo` alone", "Most output tokens; the context may end earlier."),
    Honoured("min_tokens", "0", "0 to `max_tokens`", "No EOS, stop token or stop string before this many tokens."),
    Honoured("temperature", "the model's, else 1", "0 to 2", "Under 1e-5 is greedy: the most likely token."),
    Honoured("top_p", "the model's, else 1", "above 0 to 1", "Draw from the most likely tokens of this total mass."),
    Honoured("top_k", "the model's, else off", "-1 or 0 (off), ≥ 1", "Draw from this many most likely tokens."),
    Honoured("min_p", "the model's, else 0", "0 to 1", "Drop tokens under this share of the likeliest's probability."),
    Honoured("presence_penalty", "0", "-2 to 2", "Taken off the logits of tokens already in the output."),
    Honoured("frequency_penalty", "0", "-2 to 2", "The same, once for each occurrence."),
    Honoured("repetition_penalty", "the model's, else 1", "above 0 to 10", "Divides logits of seen tokens."),
    Honoured("logit_bias", "none", "token id to -100..100; 1,024 entries", "Added to the logits."),
    Honoured("allowed_token_ids", "all", "token ids, at least one", "Only these tokens can be drawn."),
    Honoured("bad_words", "none", "256 strings", "Texts whose token sequences cannot be drawn."),
    Honoured("seed", "drawn, returned in `Headwater-Seed`", "64-bit integer", "Key of the draws; see below for `n`."),
    Honoured("n", "1", "1 to 1,024; n × prompts ≤ 1,024", "Samples of each prompt; equal ones at temperature 0."),
    Honoured("stop", "none", "string or 16 strings, 1,024 characters each", "Ends the output before this text."),
    Honoured("stop_token_ids", "none", "1,024 token ids", "End the output; their text is left out."),
    Honoured("include_stop_str_in_output", "false", "boolean", "Keep the text of what stopped the output."),
    Honoured("ignore_eos", "false", "boolean", "Go on past the model's end tokens."),
    Honoured("echo", "false", "boolean", "Put the prompt before the output, in `logprobs` too."),
    Honoured("logprobs", "none", "0 to 20", "Log-probabilities of the output and of this many candidates."),
    Honoured("prompt_logprobs", "none", "0 to 20; not with `stream`", "The same for the prompt, in vLLM's form."),
    Honoured("stream", "false", "boolean", "Server-sent events, one chunk for each choice and step."),
    Honoured("stream_options", "none", "`include_usage`, `continuous_usage_stats`", "Usage in the stream."),
    Honoured("truncate_prompt_tokens", "off", "-1 (what fits), ≥ 1", "Shorten the prompt to this many tokens."),
    Honoured("truncation_side", "left", "left, right", "Which end of the prompt is dropped."),
    Honoured("add_special_tokens", "true", "boolean", "Let the tokenizer add its BOS to text prompts."),
    Honoured("skip_special_tokens", "true", "boolean", "Leave special tokens out of the text."),
    Honoured("return_token_ids", "false", "boolean", "Add `token_ids` and `prompt_token_ids` to the choices."),
    Honoured("return_tokens_as_token_ids", "false", "boolean", "Spell tokens in logprobs as `token_id:123`."),
    Honoured("cache_salt", "none", "1 to 128 characters", "Only requests of one salt share cached prefixes."),
    Honoured("priority", "0", "32-bit integer", "Order of waiting requests; lower goes first."),
    Honoured("request_id", "`X-Request-Id`, else drawn", "128 of A-Z a-z 0-9 . _ : -", "The answer's id: `cmpl-<id>`."),
)

HARMLESS: tuple[Harmless, ...] = (
    Harmless("user", _label, "anything", "A label."),
    Harmless("metadata", _label, "anything", "A label."),
    Harmless("safety_identifier", _label, "anything", "A label."),
    Harmless("prompt_cache_key", _label, "anything", "A label: the prefix cache needs no hint."),
    Harmless("session_id", _label, "anything", "A label."),
    Harmless("store", _only(False), "false", "Nothing is stored."),
    Harmless("service_tier", _only("auto", "default"), "auto, default", "There is one tier."),
    Harmless("best_of", _one_or_n, "1 or the value of `n`", "More samples than are returned are not drawn."),
    Harmless("suffix", _only(""), "the empty string", "No filling in the middle."),
    Harmless("response_format", _only({"type": "text"}), '{"type": "text"}', "Output is free text."),
    Harmless("use_beam_search", _only(False), "false", "No beam search."),
    Harmless("length_penalty", _only(1, 1.0), "1", "Belongs to beam search."),
    Harmless("early_stopping", _only(False), "false", "Belongs to beam search."),
    Harmless("spaces_between_special_tokens", _only(True), "true", "Text is decoded as a whole."),
    Harmless("stream_interval", _only(1), "1", "One chunk a step."),
    Harmless("cache_prompt", _only(True), "true", "Prefixes are always cached."),
    Harmless("no_stop_trim", _only(False), "false", "See `include_stop_str_in_output`."),
)

REFUSED: tuple[Refused, ...] = (
    Refused("max_completion_tokens", "use `max_tokens` on this route"),
    Refused("max_new_tokens", "use `max_tokens`"),
    Refused("n_predict", "use `max_tokens`"),
    Refused("n_probs", "use `logprobs`"),
    Refused("repeat_penalty", "use `repetition_penalty`"),
    Refused("sampling_seed", "use `seed`"),
    Refused("messages", "chat is another route; this one takes `prompt`"),
    Refused("prompt_embeds", "send text or token ids in `prompt`"),
    Refused("structured_outputs", "constrained output is not served yet"),
    Refused("guided_json", "constrained output is not served yet"),
    Refused("guided_regex", "constrained output is not served yet"),
    Refused("guided_choice", "constrained output is not served yet"),
    Refused("guided_grammar", "constrained output is not served yet"),
    Refused("json_schema", "constrained output is not served yet"),
    Refused("regex", "constrained output is not served yet"),
    Refused("ebnf", "constrained output is not served yet"),
    Refused("grammar", "constrained output is not served yet"),
    Refused("stop_regex", "use `stop` or `stop_token_ids`"),
    Refused("logprob_token_ids", "use `logprobs`"),
    Refused("repetition_detection", "use `repetition_penalty`"),
    Refused("typical_p", "use `top_p`"),
    Refused("mirostat", "use `top_p`"),
    Refused("logits_processors", "no code is taken from requests"),
    Refused("lora_path", "adapters are not served yet"),
    Refused("lora", "adapters are not served yet"),
    Refused("kv_transfer_params", "there is no transfer of KV between servers"),
    Refused("vllm_xargs", "leave it out"),
    Refused("thinking_token_budget", "leave it out"),
    Refused("watermarking", "leave it out"),
)


def sort_fields(fields: Mapping[str, msgspec.Raw], *, unknown: UnknownFields) -> tuple[str, ...]:
    """Names for `Headwater-Ignored`, sorted. Raises InvalidRequest for the first field that cannot be served."""
    others = [name for name in fields if name not in _HONOURED_NAMES]
    ignored = [name for name in others if bytes(fields[name]) != b"null"]
    for name in ignored:
        _check(name, fields, unknown)
    return tuple(sorted(ignored))


def ignored_header(names: Iterable[str]) -> bytes:
    """Value of `Headwater-Ignored`. Unknown names are the client's text: odd ones are only counted."""
    listed = list(names)
    safe = [name for name in listed if _HEADER_SAFE.match(name)][:_MAX_REPORTED]
    hidden = len(listed) - len(safe)
    return ", ".join([*safe, f"and {hidden} more"] if hidden else safe).encode("ascii")


def _check(name: str, fields: Mapping[str, msgspec.Raw], unknown: UnknownFields) -> None:
    harmless = _HARMLESS_BY_NAME.get(name)
    if harmless is not None:
        if not harmless.accepts(fields[name], fields):
            raise InvalidRequest(
                f"`{name}` is accepted as {harmless.accepted} only, got {shown(fields[name])}.", param=name
            )
        return
    refused = _REFUSED_BY_NAME.get(name)
    if refused is not None:
        raise InvalidRequest(f"`{name}` is not served: {refused.instead}.", param=name, code="unsupported_field")
    if unknown is UnknownFields.REFUSE:
        close = difflib.get_close_matches(name[:64], _HONOURED_NAMES, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else " Leave it out."
        raise InvalidRequest(f"Unknown field `{shown(name)}`.{hint}", param=shown(name), code="unknown_field")


def reference_page() -> str:
    """docs/reference/completions.md."""
    honoured = _table(("field", "default", "values", "meaning"), HONOURED)
    harmless = _table(("field", "accepted values", "why"), [(one.name, one.accepted, one.meaning) for one in HARMLESS])
    refused = _table(("field", "what to do"), [(one.name, one.instead) for one in REFUSED])
    return _PAGE.format(honoured=honoured, harmless=harmless, refused=refused)


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join([f"`{row[0]}`", *(str(cell) for cell in row[1:])]) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


_HONOURED_NAMES = frozenset(one.name for one in HONOURED)
_HARMLESS_BY_NAME = {one.name: one for one in HARMLESS}
_REFUSED_BY_NAME = {one.name: one for one in REFUSED}

_PAGE = """\
# POST /v1/completions: every field

This page is generated from `app/api/schemas/fields.py` (`python -m app.api.schemas.fields`).

Each field is honoured, harmless or refused; `null` means "not given". What is refused is a 400 that
names the field in `error.param`, before anything is computed.

## Honoured

{honoured}

Sample 0 of a prompt uses the seed itself. Sample i > 0 uses the first 8 bytes, little-endian, of
BLAKE2b-64 over the seed and i, each as 8 little-endian bytes: the tokens of a sample depend neither on
`n` nor on the other prompts of the request. A seed that the server draws has 53 bits, so that every JSON
reader keeps it whole.

`text_offset` counts characters of the text from its start, the echoed prompt included. A token that
begins inside a character has that character's offset.

`usage.prompt_tokens` counts each prompt once, `completion_tokens` the output of all samples, an end token
included. What a model made beyond a stop string is not counted.

## Harmless

Accepted with these values and named in the response header `Headwater-Ignored`. Other values are refused.

{harmless}

## Refused

{refused}

## Unknown

Any other field is a 400 under `--unknown-fields refuse` (the default of this route). Under
`--unknown-fields report` it is ignored and named in `Headwater-Ignored`; refused fields stay refused.
"""


def main() -> None:
    """Print the reference page."""
    sys.stdout.write(reference_page())


if __name__ == "__main__":
    main()
