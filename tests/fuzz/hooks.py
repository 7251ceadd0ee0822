"""Schemathesis's side of the conformance run: loaded by `st run` through SCHEMATHESIS_HOOKS.

Schemathesis makes the requests; whether one is valid is decided here, by the document as it is served. Its rules
about several fields (`if` / `then`) and the branches of a message are taken out of what the generator reads: it
multiplies them into more cases than it can hold, and without them it also makes the bodies that they forbid.

The check `document_decides` stands in the place of schemathesis's own for valid requests: one that is refused
names a rule of `tests.fuzz.rules` in the API's error form; one that breaks a rule about several fields is not
accepted. It counts every case, and writes the counts to the file FUZZ_COUNTS when the process ends. FUZZ_MAX_TOKENS
caps what a request may generate, for engines that compute. Deadlines are raised to a minute: one that passes is a 504,
of the client's own making.
"""

import atexit
import copy
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response

from tests.fuzz.rules import rule_of

_TOO_HARD = ("MessageParam",)
"""Whose branches the generator sometimes fails to negate, and ends with an error of its own."""
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_ENDLESS = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
"""Routes whose answers may fill the context where no limit is given, and the limit's name."""
_PROMPTS = frozenset({"prompt", "messages", "input"})
_MAX_LIMIT = 2**31
_DEADLINE = "X-Request-Deadline"
_PATIENCE = 60


class Judge:
    """Decides about answers by the whole document, and counts them."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        """By what the document says of the request, and the answer's status."""
        self.operations: Counter[str] = Counter()
        self.rules: Counter[str] = Counter()
        """Named by refusals of valid requests."""
        self._document: dict[str, Any] = {}
        self._validators: dict[str, jsonschema_rs.Validator] = {}

    def read(self, document: dict[str, Any]) -> None:
        """Keep a copy of the document and take the rules about several fields out of it."""
        self._document = copy.deepcopy(document)
        for name in _TOO_HARD:
            document["components"]["schemas"][name].pop("oneOf", None)
        for schema in document["components"]["schemas"].values():
            rules = [rule for rule in schema.get("allOf", ()) if "if" not in rule]
            if "allOf" in schema:
                schema["allOf"] = rules
            if not rules:
                schema.pop("allOf", None)

    def check(self, case: Case[Any], response: Response) -> None:
        """Raises AssertionError where the answer and the document do not agree."""
        status = response.status_code
        made_valid = case.meta is not None and case.meta.generation.mode.is_positive
        is_valid = made_valid and self._is_valid(case)
        self.cases[f"{'valid' if is_valid else 'invalid'} {status}"] += 1
        self.operations[case.operation.label] += 1
        if made_valid and not is_valid:
            assert status >= 400, "accepted, though the document forbids these fields together"
        if is_valid and status >= 400:
            rule = rule_of(status, response.content)
            assert rule is not None, f"refused without a rule that a schema cannot express: {response.text[:400]}"
            self.rules[rule.name] += 1

    def write(self, path: Path) -> None:
        """Leave the counts for whoever started this process."""
        counts = {"cases": self.cases, "operations": self.operations, "rules": self.rules}
        path.write_text(json.dumps(counts), encoding="utf-8")

    def _is_valid(self, case: Case[Any]) -> bool:
        name = _body_schema(self._document, case)
        if name is None:
            return True
        if name not in self._validators:
            schema = {"$ref": f"#/components/schemas/{name}", "components": self._document["components"]}
            self._validators[name] = jsonschema_rs.Draft202012Validator(schema)
        return self._validators[name].is_valid(case.body)


def capped(body: Any, path: str, most: int) -> Any:
    """The body with at most `most` output tokens asked for; one that is invalid stays so."""
    if not isinstance(body, dict) or not _PROMPTS & set(body):
        return body
    over = {
        name: most
        for name in _LIMITS
        if isinstance(value := body.get(name), int) and not isinstance(value, bool) and most < value < _MAX_LIMIT
    }
    own = _ENDLESS.get(path)
    if own is not None and all(body.get(name) is None for name in _LIMITS):
        over[own] = most
    return body | over


def be_patient(case: Case[Any]) -> None:
    """No deadline under a minute; one that is invalid stays so."""
    try:
        is_short = -1e10 < float(case.headers.get(_DEADLINE, "nan")) < _PATIENCE
    except ValueError:
        return
    if is_short:
        case.headers[_DEADLINE] = str(_PATIENCE)


def _body_schema(document: dict[str, Any], case: Case[Any]) -> str | None:
    """The component that describes the case's body; None where there is none."""
    operation = document["paths"][case.operation.path][case.operation.method.lower()]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference: str | None = content.get("schema", {}).get("$ref")
    return None if reference is None else reference.rpartition("/")[2]


def _register() -> None:
    judge = Judge()
    target = os.environ.get("FUZZ_COUNTS")
    if target is not None:
        atexit.register(judge.write, Path(target))

    @schemathesis.hook("before_load_schema")
    def keep_document(_context: HookContext, raw_schema: dict[str, Any]) -> None:
        judge.read(raw_schema)

    @schemathesis.check
    def document_decides(_context: CheckContext, response: Response, case: Case[Any]) -> None:
        judge.check(case, response)

    cap = os.environ.get("FUZZ_MAX_TOKENS")

    @schemathesis.hook("before_call")
    def tame(_context: HookContext, case: Case[Any], **_options: Any) -> None:
        be_patient(case)
        if cap is not None:
            case.body = capped(case.body, case.operation.path, int(cap))


_register()
