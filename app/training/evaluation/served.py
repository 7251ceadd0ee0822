"""A model behind an OpenAI-compatible server that takes token ids as prompts."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from app.core.errors import ConfigurationError
from app.training.errors import TrainingStopped
from app.training.evaluation.scorer import Generation, Scores, TokenIds

KEY_VARIABLE = "OPENAI_API_KEY"
_NUM_PARALLEL = 16
_TIMEOUT_S = 600.0
_One = TypeVar("_One")
_Made = TypeVar("_Made")


class ServedScorer:
    """Asks `/v1/completions`, some requests at a time.

    Raises (in each method):
        TrainingStopped: the server answers with an error, or not at all.
    """

    def __init__(self, url: str, *, context: int) -> None:
        """`context` is the model's; the server's is asked for, and the smaller counts."""
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT_S)
        try:
            answer = self._client.get("/v1/models")
            answer.raise_for_status()
            model = answer.json()["data"][0]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise ConfigurationError(f"no server that lists models answers at {url}: {error}") from error
        self._model = str(model["id"])
        self._context = min(context, int(model.get("max_model_len") or context)) - 1

    @property
    def context(self) -> int:
        """One less than the server's."""
        return self._context

    def score(self, sequences: Sequence[TokenIds]) -> list[Scores]:
        """As Scorer says."""
        return self._each(self._score, sequences)

    def generate(self, generations: Sequence[Generation]) -> list[str]:
        """As Scorer says."""
        return self._each(self._generate, generations)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _score(self, token_ids: TokenIds) -> Scores:
        body = {"prompt": list(token_ids), "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        logprobs = self._ask(body)["logprobs"]
        chosen, top = logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:]
        if len(chosen) != len(token_ids) - 1:
            raise TrainingStopped(f"the server scored {len(chosen) + 1} tokens where {len(token_ids)} were sent")
        is_first = (one >= max(others.values()) for one, others in zip(chosen, top, strict=True))
        return Scores(tuple(chosen), tuple(is_first))

    def _generate(self, generation: Generation) -> str:
        body: dict[str, Any] = {
            "prompt": list(generation.prompt),
            "max_tokens": generation.max_tokens,
            "temperature": 0,
        }
        return str(self._ask(body | ({"stop": list(generation.stop)} if generation.stop else {}))["text"])

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.post("/v1/completions", json={"model": self._model, **body})
            if answer.is_error:
                raise TrainingStopped(f"the server answers {answer.status_code}: {answer.text[:500]}")
            return dict(answer.json()["choices"][0])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise TrainingStopped(f"the server at {self._client.base_url} does not answer: {error}") from error

    def _each(self, ask: Callable[[_One], _Made], things: Sequence[_One]) -> list[_Made]:
        with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
            return list(pool.map(ask, things))
