"""The fine-tuning loop: measures, learns, stops early, keeps the best weights, and measures again.

The weights with the lowest validation loss lie in `best/` of the run folder, whole or not there. SIGTERM and Ctrl-C
end the run after the step at hand, with the best so far. A second run in the same folder begins anew.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from app.core.errors import ConfigurationError
from app.training.checkpoint import write_whole
from app.training.devices import autocast, choose_dtype
from app.training.errors import TrainingStopped
from app.training.metrics import MetricsFile
from app.training.optimizer import Optimizer
from app.training.packing import NO_LABEL
from app.training.progress import RunDisplay, run_display
from app.training.recipe import ScheduleTable
from app.training.report import write_report
from app.training.schedule import learning_rate
from app.training.signals import stop_signals
from app.training.tuning.batches import answer_logits, answer_loss, epoch_order, make_batch
from app.training.tuning.encoding import Encoded
from app.training.tuning.methods import moving_weights
from app.training.tuning.recipe import TrainTable, TuningRecipe

_BEST = "best"


@dataclass(frozen=True)
class Score:
    """Over the validation examples."""

    loss: float
    """Nats a token of the answers."""
    exact: float
    """Share of examples whose every answer token is the model's first choice: what greedy decoding gets right."""

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {math.exp(min(self.loss, 100.0)):.2f}, exact answers {self.exact:.1%}"


@dataclass(kw_only=True)
class Tuning:
    """A run in progress; only the functions below change it."""

    recipe: TuningRecipe
    model: nn.Module
    optimizer: Optimizer
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    device: torch.device
    metrics: MetricsFile
    step: int = 0
    best: float = math.inf
    num_worse: int = 0
    """Evaluations since the best."""
    is_stopping: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.recipe.run.folder)

    @property
    def steps_per_epoch(self) -> int:
        """The last one of an epoch may have fewer examples."""
        return -(-len(self.train) // self.recipe.train.examples_per_step)

    @property
    def steps(self) -> int:
        """Of the whole run, where it does not end early."""
        return self.recipe.train.epochs * self.steps_per_epoch

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return choose_dtype(self.recipe.train.dtype, self.device)

    def stop(self) -> None:
        """End after the step at hand."""
        self.is_stopping = True


def tune(run: Tuning, *, description: str) -> tuple[Score, Score]:
    """Learn until the last step, or until validation no longer improves; the model then has its best weights.

    Returns:
        The scores before and after.

    Raises:
        TrainingStopped: the loss is no number, or a file cannot be written; the best weights so far are kept.
    """
    try:
        with closing(run.metrics), run_display(steps=run.steps, done=0) as display:
            display.line(description)
            before = _evaluate(run, display)
            with stop_signals(run.stop):
                _learn(run, display)
            _restore_best(run)
            after = evaluate(run.model, run.validation, dtype=run.dtype, device=run.device)
            display.line(f"before: {before}\nafter:  {after}")
        write_report(run.folder)
    except OSError as error:
        raise TrainingStopped(f"a file of the run cannot be written: {error}. {_kept(run)}") from error
    return before, after


def tune_step(run: Tuning) -> tuple[float, float]:
    """One step of the optimiser: (loss in nats a token, norm of the gradient before clipping).

    Raises:
        TrainingStopped: the loss or the norm is no finite number; the weights are those before the step.
    """
    train = run.recipe.train
    epoch, place = divmod(run.step, run.steps_per_epoch)
    first = place * train.examples_per_step
    chosen = epoch_order(len(run.train), seed=train.seed, epoch=epoch)[first : first + train.examples_per_step]
    batch = make_batch([run.train[index] for index in chosen], device=run.device)
    rate = learning_rate(_schedule(train, steps=run.steps), run.step, steps=run.steps)
    with autocast(run.dtype, run.device)():
        logits, labels = answer_logits(run.model, batch)
    loss = answer_loss(logits, labels) / batch.num_labels
    loss.backward()
    value = float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(list(moving_weights(run.model).values()), train.clip_norm))
    if not math.isfinite(value) or not math.isfinite(norm):
        raise TrainingStopped(
            f"the loss of step {run.step + 1} is {value} (examples {chosen}, learning rate {rate:.2e}). "
            f"{_kept(run)}; lower the learning rate or clip_norm"
        )
    run.optimizer.step(rate)
    run.step += 1
    return value, norm


def evaluate(model: nn.Module, examples: Sequence[Encoded], *, dtype: torch.dtype, device: torch.device) -> Score:
    """Score the answers of examples, one example at a time."""
    was_training, total, num_labels, num_exact = model.training, 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for example in examples:
            batch = make_batch([example], device=device)
            with autocast(dtype, device)():
                logits, labels = answer_logits(model, batch)
            total += float(answer_loss(logits, labels))
            num_labels += batch.num_labels
            is_label = labels != NO_LABEL
            num_exact += bool((logits.argmax(-1) == labels)[is_label].all())
    model.train(was_training)
    return Score(total / num_labels, num_exact / len(examples))


def _learn(run: Tuning, display: RunDisplay) -> None:
    train, log_every = run.recipe.train, run.recipe.run.log_every
    every = run.steps_per_epoch if train.evaluate_every is None else train.evaluate_every
    mark = time.monotonic()
    while run.step < run.steps and not run.is_stopping and run.num_worse < train.patience:
        loss, norm = tune_step(run)
        figures = None
        if run.step % log_every == 0 or run.step == run.steps:
            seconds, mark = time.monotonic() - mark, time.monotonic()
            figures = f"loss {loss:.4f}, grad norm {norm:.2f}, learning rate {run.optimizer.rate:.2e}"
            run.metrics.write(
                {
                    "step": run.step,
                    "loss": round(loss, 6),
                    "learning_rate": run.optimizer.rate,
                    "grad_norm": round(norm, 4),
                    "steps_per_second": round(log_every / max(seconds, 1e-9), 3),
                    "seconds": round(time.monotonic() - run.started, 1),
                }
            )
        display.step(run.step, figures=figures)
        if run.step % every == 0 or run.step == run.steps or run.is_stopping:
            _evaluate(run, display)
    if run.num_worse >= train.patience:
        display.line(f"step {run.step}: {run.num_worse} evaluations without a lower validation loss; the run ends")


def _evaluate(run: Tuning, display: RunDisplay) -> Score:
    score = evaluate(run.model, run.validation, dtype=run.dtype, device=run.device)
    run.metrics.write(
        {
            "step": run.step,
            "heldout_loss": round(score.loss, 6),
            "heldout_perplexity": round(math.exp(min(score.loss, 100.0)), 3),
            "exact_answers": round(score.exact, 4),
        }
    )
    display.line(f"step {run.step}: validation {score}")
    if score.loss < run.best:
        run.best, run.num_worse = score.loss, 0
        write_whole(run.folder / _BEST / "weights.safetensors", moving_weights(run.model))
    else:
        run.num_worse += 1
    write_report(run.folder)
    return score


def _restore_best(run: Tuning) -> None:
    weights = load_file(run.folder / _BEST / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in moving_weights(run.model).items():
            parameter.copy_(weights[name])


def _schedule(train: TrainTable, *, steps: int) -> ScheduleTable:
    return ScheduleTable(
        kind="cosine",
        learning_rate=train.learning_rate,
        warmup_steps=min(math.ceil(steps * train.warmup_share), steps),
        last_share=0.0,
    )


def _kept(run: Tuning) -> str:
    path = run.folder / _BEST / "weights.safetensors"
    return f"The best weights so far are in {path}" if path.is_file() else "Nothing was kept yet"


def require_some(examples: Sequence[Encoded], *, context: int, what: str) -> None:
    """Raise ConfigurationError where no example is left."""
    if not examples:
        raise ConfigurationError(f"no {what} example has at most {context} tokens; raise data.context or shorten them")
