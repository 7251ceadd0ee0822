"""How the rows of a benchmark are drawn: from the largest logit alone to all that a request can ask."""

from typing import Any

import msgspec

from app.core.types import SamplingParams

_FILTERS = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
ROW_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "filtered": _FILTERS,
    "penalised": {**_FILTERS, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
}


def drawn_as(kind: str, params: SamplingParams) -> SamplingParams:
    """The parameters of a row of this kind."""
    return msgspec.structs.replace(params, **ROW_KINDS[kind])
