"""The whole of `headwater evaluate`: a model, what to measure it by, and a report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from app.core.errors import ConfigurationError
from app.training.corpus import read_corpus
from app.training.evaluation.local import LocalScorer
from app.training.evaluation.perplexity import score_texts
from app.training.evaluation.scorer import Scorer
from app.training.evaluation.served import ServedScorer
from app.training.tuning.publish import end_ids, open_base

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What to measure by."""

    texts: Sequence[Path] = ()
    tasks: Path | None = None
    """Folder of the harness's .yaml files."""
    limit: int | None = None
    """Most documents of the texts, and of each task."""


def evaluate_model(
    folder: Path,
    measures: Measures,
    *,
    url: str | None,
    dtype: Literal["auto", "bfloat16", "float32"] = "float32",
    threads: int = 0,
) -> Report:
    """Measure the model of a folder, in process or as the server at `url` gives it.

    Args:
        folder: of the model; its tokenizer is used in either case.

    Raises:
        ConfigurationError: there is nothing to measure by, or something does not fit.
        TrainingStopped: the server does not answer.
    """
    if not measures.texts and measures.tasks is None:
        raise ConfigurationError("there is nothing to measure by: give --text or --tasks")
    if threads:
        torch.set_num_threads(threads)
    texts = read_corpus(measures.texts).documents[: measures.limit] if measures.texts else ()
    model, tokenizer = open_base(folder)
    end_id = end_ids(folder, model.config.to_dict())[0]
    start_id = end_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    scorer: Scorer
    if url is None:
        scorer = LocalScorer(model, tokenizer, dtype=dtype)
    else:
        scorer = ServedScorer(url, context=model.config.max_position_embeddings)
    report: Report = {"model": folder.name, "where": "in process" if url is None else url}
    if texts:
        score = score_texts(scorer, tokenizer, texts, start_id=start_id)
        report["text"] = {**asdict(score), "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    if measures.tasks is not None:
        report["tasks"] = _tasks(
            scorer, tokenizer, measures.tasks, start_id=start_id, end_id=end_id, limit=measures.limit
        )
    if isinstance(scorer, ServedScorer):
        scorer.close()
    return report


def _tasks(scorer: Scorer, tokenizer: Any, folder: Path, **options: Any) -> Any:
    try:
        from app.training.evaluation.harness import run_tasks
    except ImportError as error:
        raise ConfigurationError(
            f"--tasks needs the LM Evaluation Harness ({error}); install it with: pip install 'headwater[evaluate]'"
        ) from error
    return run_tasks(scorer, tokenizer, folder, **options)


def describe(report: Report) -> str:
    """Lines to read."""
    lines = [f"{report['model']}, {report['where']}"]
    if text := report.get("text"):
        lines.append(
            f"text: {text['num_documents']} documents, {text['num_tokens']:,} tokens, loss {text['loss']:.4f}, "
            f"perplexity {text['perplexity']:.3f}, {text['bits_per_byte']:.4f} bits a byte"
        )
    for task, metrics in report.get("tasks", {}).items():
        lines.append(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return "\n".join(lines)
