"""The fine-tuning loop: measures, learns, stops early, keeps the best weights, and measures again.

A step depends on the recipe and on its number alone, so a run that was stopped and resumed takes the same steps as one
that was not. SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint and with what was best so far.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing

import torch
from torch import nn

from app.core.errors import ConfigurationError
from app.training.devices import autocast
from app.training.errors import TrainingStopped
from app.training.packing import NO_LABEL
from app.training.progress import RunDisplay, run_display
from app.training.recipe import ScheduleTable
from app.training.report import write_report
from app.training.schedule import learning_rate
from app.training.signals import stop_signals
from app.training.tuning.batches import answer_logits, answer_loss, epoch_order, make_batch
from app.training.tuning.encoding import Encoded
from app.training.tuning.methods import moving_weights
from app.training.tuning.recipe import TrainTable
from app.training.tuning.run import Score, Tuning, keep_best, save, take_best, what_is_kept


def tune(run: Tuning, *, description: str) -> tuple[Score, Score]:
    """Learn until the last step, or until validation no longer improves; the model then has its best weights.

    Returns:
        The scores before and after.

    Raises:
        TrainingStopped: the loss is no number, or a file cannot be written; the last checkpoint is kept.
    """
    try:
        with closing(run.metrics), run_display(steps=run.steps, done=run.step) as display:
            display.line(description)
            if run.before is None:
                run.before = _evaluate(run, display)
            with stop_signals(run.stop):
                _learn(run, display)
            after = _settle(run)
            display.line(f"before: {run.before}\nafter:  {after}")
        write_report(run.folder)
    except OSError as error:
        raise TrainingStopped(f"a file of the run cannot be written: {error}. {what_is_kept(run)}") from error
    return run.before, after


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
            f"{what_is_kept(run)}; lower the learning rate or clip_norm"
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
    train, table = run.recipe.train, run.recipe.run
    every = run.steps_per_epoch if train.evaluate_every is None else train.evaluate_every
    mark, mark_step, saved_step = time.monotonic(), run.step, run.step
    while run.step < run.steps and not run.is_stopping and not run.is_worn_out:
        loss, norm = tune_step(run)
        figures = None
        if run.step % table.log_every == 0 or run.step == run.steps:
            now = time.monotonic()
            rate = (run.step - mark_step) / max(now - mark, 1e-9)
            figures = _log_step(run, loss=loss, norm=norm, steps_per_second=rate)
            mark, mark_step = now, run.step
        display.step(run.step, figures=figures)
        if run.step % every == 0 or run.step == run.steps:
            _evaluate(run, display)
        if run.step % table.checkpoint_every == 0:
            save(run)
            saved_step = run.step
    if saved_step != run.step:
        save(run)
    if run.is_worn_out:
        display.line(f"step {run.step}: {run.num_worse} evaluations without a lower validation loss; the run ends")
    elif run.step < run.steps:
        display.line(f"stopped after step {run.step} of {run.steps}; the same command goes on from there")


def _log_step(run: Tuning, *, loss: float, norm: float, steps_per_second: float) -> str:
    rate = run.optimizer.rate
    run.metrics.write(
        {
            "step": run.step,
            "loss": round(loss, 6),
            "learning_rate": rate,
            "grad_norm": round(norm, 4),
            "steps_per_second": round(steps_per_second, 3),
            "seconds": round(run.elapsed, 1),
        }
    )
    return f"loss {loss:.4f}, grad norm {norm:.2f}, learning rate {rate:.2e}"


def _evaluate(run: Tuning, display: RunDisplay) -> Score:
    score = evaluate(run.model, run.validation, dtype=run.dtype, device=run.device)
    if not math.isfinite(score.loss):
        raise TrainingStopped(f"the validation loss after step {run.step} is {score.loss}. {what_is_kept(run)}")
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
        keep_best(run, score)
    else:
        run.num_worse += 1
    write_report(run.folder)
    return score


def _settle(run: Tuning) -> Score:
    """Leave the model with the best weights; those of now, which nothing kept, may be the best of a stopped run."""
    if run.is_stopping:
        score = evaluate(run.model, run.validation, dtype=run.dtype, device=run.device)
        if score.loss < run.best:
            return score
    take_best(run)
    return evaluate(run.model, run.validation, dtype=run.dtype, device=run.device)


def _schedule(train: TrainTable, *, steps: int) -> ScheduleTable:
    return ScheduleTable(
        kind="cosine",
        learning_rate=train.learning_rate,
        warmup_steps=min(math.ceil(steps * train.warmup_share), steps),
        last_share=0.0,
    )


def require_some(examples: Sequence[Encoded], *, context: int, what: str) -> None:
    """Raise ConfigurationError where no example is left."""
    if not examples:
        raise ConfigurationError(f"no {what} example has at most {context} tokens; raise data.context or shorten them")
