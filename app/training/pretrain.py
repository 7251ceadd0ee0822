"""The pretraining loop: one recipe, one run folder, any number of interruptions.

A step depends on the recipe and on its number alone, so a run that was stopped and resumed takes the same steps as
one that was not. SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint.
"""

import math
import time
from pathlib import Path

import torch

from app.training.errors import TrainingStopped
from app.training.export import export_model
from app.training.progress import RunDisplay, run_display
from app.training.recipe import Recipe
from app.training.report import write_report
from app.training.run import Run, last_good, open_run, save
from app.training.samples import sample_text
from app.training.signals import stop_signals
from app.training.step import heldout_loss, train_step
from app.training.workers import join_workers


def pretrain(recipe: Recipe) -> Path | None:
    """Train to the recipe's last step, from the run folder's last checkpoint if it has one.

    Returns:
        The folder of the finished model; None where the run was asked to stop before its end, and in each process
        but the first.

    Raises:
        ConfigurationError: the recipe, its data and what is in the run folder do not fit.
        TrainingStopped: the loss is no number, or a file cannot be written.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    with join_workers() as workers:
        run = open_run(recipe, workers=workers)
        try:
            with run_display(steps=recipe.train.steps, done=run.step, is_shown=workers.is_first) as display:
                display.line(run.describe())
                with stop_signals(run.stop):
                    _train(run, display)
            return _finish(run, display)
        except OSError as error:
            raise TrainingStopped(f"a file of the run cannot be written: {error}. {last_good(run)}") from error
        finally:
            run.metrics.close()


def _train(run: Run, display: RunDisplay) -> None:
    table, steps = run.recipe.run, run.recipe.train.steps
    tokens_per_step = run.recipe.train.rows_per_step * run.recipe.model.context
    mark, mark_step, saved_step = time.monotonic(), run.step, run.step
    if run.step == 0 and run.workers.is_first:
        _evaluate(run, display)
    while run.step < steps and not run.is_stopping:
        loss, norm = train_step(run)
        figures = None
        if run.step % table.log_every == 0 or run.step == steps:
            now = time.monotonic()
            rate = (run.step - mark_step) * tokens_per_step / max(now - mark, 1e-9)
            figures = _log_step(run, loss=loss, norm=norm, tokens_per_second=rate)
            mark, mark_step = now, run.step
        display.step(run.step, figures=figures)
        if run.workers.is_first:
            saved_step = _after_step(run, display, saved_step=saved_step)
    if run.step != saved_step and run.workers.is_first:
        save(run)


def _after_step(run: Run, display: RunDisplay, *, saved_step: int) -> int:
    """What the first process does every so many steps; returns the step of the last checkpoint."""
    table, is_last = run.recipe.run, run.step == run.recipe.train.steps
    if run.step % table.evaluate_every == 0 or is_last:
        _evaluate(run, display)
    if run.step % table.sample_every == 0 or is_last:
        _sample(run, display)
    if run.step % table.checkpoint_every:
        return saved_step
    save(run)
    return run.step


def _finish(run: Run, display: RunDisplay) -> Path | None:
    if not run.workers.is_first:
        return None
    write_report(run.folder)
    if run.step < run.recipe.train.steps:
        display.line(f"stopped after step {run.step}; the same command goes on from there")
        return None
    target = run.folder / "model"
    dtype = torch.bfloat16 if run.recipe.run.save_dtype == "bfloat16" else torch.float32
    export_model(run.model, run.shards.folder, target, dtype=dtype)
    return target


def _log_step(run: Run, *, loss: float, norm: float, tokens_per_second: float) -> str:
    rate = run.optimizer.rate
    run.metrics.write(
        {
            "step": run.step,
            "loss": round(loss, 6),
            "learning_rate": rate,
            "grad_norm": round(norm, 4),
            "tokens_per_second": round(tokens_per_second, 1),
            "seconds": round(run.elapsed, 1),
        }
    )
    return f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, grad norm {norm:.2f}, learning rate {rate:.2e}"


def _evaluate(run: Run, display: RunDisplay) -> None:
    loss, facts = heldout_loss(run), run.shards.facts.heldout
    num_labels = facts.num_tokens - facts.num_documents  # a start token is never a label
    bits = loss / math.log(2) * num_labels / facts.num_bytes
    perplexity = math.exp(min(loss, 100.0))
    run.metrics.write(
        {
            "step": run.step,
            "heldout_loss": round(loss, 6),
            "heldout_perplexity": round(perplexity, 3),
            "heldout_bits_per_byte": round(bits, 5),
        }
    )
    display.line(f"step {run.step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.4f} bits a byte")
    write_report(run.folder)


def _sample(run: Run, display: RunDisplay) -> None:
    for prompt in run.recipe.run.prompts:
        text = sample_text(run.model, run.tokenizer, prompt, num_tokens=run.recipe.run.sample_tokens, seed=run.step)
        run.metrics.write({"step": run.step, "sample": text})
        display.sample(run.step, text)
