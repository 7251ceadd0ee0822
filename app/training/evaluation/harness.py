"""Runs local task files of EleutherAI's LM Evaluation Harness (the extra `evaluate`) through a scorer."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from app.core.errors import ConfigurationError
from app.training.evaluation.scorer import Generation, Scorer, windows

_DEFAULT_MAX_TOKENS = 256
TaskResults = Mapping[str, Mapping[str, float]]
"""By task and metric, as the harness names them."""


def run_tasks(
    scorer: Scorer, tokenizer: Any, folder: Path, *, start_id: int, end_id: int, limit: int | None
) -> TaskResults:
    """Run every task of a folder of .yaml files.

    Args:
        limit: most documents of each task; None: all.

    Raises:
        ConfigurationError: there is no task, or one cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder of task files")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = sorted(manager.all_subtasks)
    if not names:
        raise ConfigurationError(f"{folder} holds no task: give a folder of .yaml files of the LM Evaluation Harness")
    model = _HarnessModel(scorer, tokenizer, start_id=start_id, end_id=end_id)
    try:
        done = simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"the tasks of {folder} cannot be run: {error}") from error
    assert done is not None
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and "_stderr" not in name and "," in name
        }
        for task, metrics in done["results"].items()
    }


class _HarnessModel(TemplateLM):
    """The harness's own conventions for contexts and continuations, over token ids that the scorer sees."""

    def __init__(self, scorer: Scorer, tokenizer: Any, *, start_id: int, end_id: int) -> None:
        super().__init__()
        self._scorer = scorer
        self.tokenizer = tokenizer
        self._start_id = start_id
        self._end_id = end_id

    @property
    def eot_token_id(self) -> int:
        return self._end_id

    @property
    def prefix_token_id(self) -> int:
        return self._start_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace(os.sep, "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        is_begin = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=is_begin)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        most = self._scorer.context
        sequences = [[*context, *continuation][-most:] for _text, context, continuation in requests]
        results = []
        for scores, request in zip(self._scorer.score(sequences), requests, strict=True):
            continuation = request[2]
            count = min(len(continuation), len(scores.logprobs))
            results.append((sum(scores.logprobs[-count:]), all(scores.is_first[-count:])))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            ids = [self._start_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            pieces = list(windows(len(ids), context=self._scorer.context))
            scores = self._scorer.score([ids[begin:end] for begin, end, _ in pieces])
            totals.append(
                sum(
                    sum(one.logprobs[scored - begin - 1 :])
                    for one, (begin, _, scored) in zip(scores, pieces, strict=True)
                )
            )
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._scorer.generate([self._generation(*request.args) for request in requests])

    def _generation(self, context: str, settings: Mapping[str, Any]) -> Generation:
        if settings.get("do_sample") or settings.get("temperature", 0):
            raise ConfigurationError("a task asks for sampled output; only greedy output can be compared")
        until = settings.get("until", [])
        stop: Sequence[str] = [until] if isinstance(until, str) else until
        max_tokens = int(settings.get("max_gen_toks", _DEFAULT_MAX_TOKENS))
        most = max(self._scorer.context - max_tokens, 1)
        return Generation(tuple(self.tok_encode(context)[-most:]), max_tokens, tuple(filter(None, stop)))
