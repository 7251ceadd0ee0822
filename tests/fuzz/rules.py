"""Rules about requests that JSON Schema cannot express: why a schema-valid request may be refused."""

import json
import re
from typing import NamedTuple


class Rule(NamedTuple):
    """One rule, and how a refusal names it."""

    name: str
    status: int
    message: re.Pattern[str]
    why: str
    """What the rule depends on that a schema does not see."""


def _rule(name: str, status: int, message: str, why: str) -> Rule:
    return Rule(name, status, re.compile(message, re.DOTALL), why)


_MODEL = "the served model"
_STORE = "what the server holds"
_CURSOR = "a header says how far an earlier answer went"
_TWO_FIELDS = "two numbers of the request are compared"
_LANGUAGE = "text in a language of its own"

RULES: tuple[Rule, ...] = (
    _rule("model name", 404, r"The model `.*` does not exist here", _MODEL),
    _rule("no embedding model", 400, r"it is no embedding model", _MODEL),
    _rule("context length", 400, r"context (length is|of) \d+ tokens", _MODEL),
    _rule("vocabulary", 400, r"outside the vocabulary", _MODEL),
    _rule("template variables", 400, r"`chat_template_kwargs\..*the model's chat template does not read it", _MODEL),
    _rule("template and tools", 400, r"chat template shows it no tools|this model's calls are JSON, too", _MODEL),
    _rule("stored response", 404, r"^No response with id `.*` is stored", _STORE),
    _rule("previous response", 400, r"^Previous response with id `.*` not found", _STORE),
    _rule("item of a response", 400, r"^`after` is `.*`, which is no item of this response", _STORE),
    _rule("nothing to cancel", 400, r"^Only a response made with `background: true` can be cancelled", _STORE),
    _rule("template", 400, r"^the model's chat template refuses these messages", _MODEL),
    _rule(
        "form of numbers", 400, r"a whole number is written without fraction and exponent", "1.0 is an integer to it"
    ),
    _rule("form of deadlines", 400, r"^The header X-Request-Deadline is `[^`]*(e|\.\d{10})", "1e-7 is a number to it"),
    _rule("min_tokens", 400, r"`min_tokens` is \d+, more than", _TWO_FIELDS),
    _rule("best_of", 400, r"`best_of` is accepted as 1 or the value of `n` only", _TWO_FIELDS),
    _rule("cursor", 400, r"`Last-Event-ID`|^`resume_token_ids` holds", _CURSOR),
    _rule("cursor", 409, r"`Last-Event-ID`|`resume_token_ids`", _CURSOR),
    _rule("choices of a resumable stream", 400, r"^A resumable stream has at most", _TWO_FIELDS),
    _rule("tool names", 400, r"`tools\[\d+\]` has the name of an earlier one", "one field of all items is compared"),
    _rule("tool choice", 400, r"names a function that is not among the `tools`", "two fields are compared"),
    _rule("thinking", 400, r"^`thinking` is accepted as disabled only", _MODEL),
    _rule("tokens left", 400, r"`allowed_token_ids`.*none is left to draw|leave no token to draw", _MODEL),
    _rule(
        "grammar",
        400,
        r"^`(structured_outputs|response_format|text\.format|tools)`: |^The output cannot go on within the grammar",
        _LANGUAGE,
    ),
)


def rule_of(status: int, body: bytes) -> Rule | None:
    """The rule that a refusal names; None where its body is not the API's error form, or names none."""
    try:
        error = json.loads(body)["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return next((rule for rule in RULES if rule.status == status and rule.message.search(message)), None)
