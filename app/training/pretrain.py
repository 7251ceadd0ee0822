"""The pretraining loop: one recipe, one run folder, any number of interruptions.

A step depends on the recipe and on its number alone, so a run that was stopped and resumed takes the same steps as
one that was not. SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint.
"""

import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec
import tokenizers
import torch
from torch import nn
from transformers import PreTrainedModel

from app.core.errors import ConfigurationError
from app.training.checkpoint import Checkpoint, CheckpointState, last_checkpoint, load_checkpoint, save_checkpoint
from app.training.devices import autocast, choose_dtype
from app.training.errors import TrainingStopped
from app.training.export import export_model
from app.training.metrics import MetricsFile
from app.training.model import build_model, packed_logits, summed_loss
from app.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from app.training.packing import NO_LABEL, PackedRows
from app.training.progress import RunDisplay, run_display
from app.training.recipe import Recipe
from app.training.report import write_report
from app.training.samples import sample_text
from app.training.schedule import learning_rate
from app.training.shards import Shards, open_shards
from app.training.tokenizer import END, START, load_tokenizer, special_id
from app.training.workers import Workers, join_workers

_EVALUATION_ROWS = 8
"""In one forward pass."""
ALONE = Workers(0, 1, torch.device("cpu"))
"""One process on the CPU."""


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
        with run_display(steps=recipe.train.steps, done=run.step, is_shown=workers.is_first) as display:
            display.line(run.describe())
            with _stop_signals(run):
                _train(run, display)
        return _finish(run, display)


@dataclass(kw_only=True)
class Run:
    """A run in progress; only the functions below change it."""

    recipe: Recipe
    shards: Shards
    tokenizer: tokenizers.Tokenizer
    model: PreTrainedModel
    forward: nn.Module
    """The model as training steps call it: itself, or compiled."""
    optimizer: torch.optim.AdamW
    workers: Workers
    dtype: torch.dtype
    rows: PackedRows
    heldout: PackedRows
    metrics: MetricsFile
    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Of training before this process."""
    is_stopping: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.recipe.run.folder)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.workers.device

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all processes of the run."""
        return self.seconds + time.monotonic() - self.started

    def describe(self) -> str:
        """One line: what is trained on what."""
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        train = self.recipe.train
        tokens = train.steps * train.rows_per_step * self.recipe.model.context
        return (
            f"{self.recipe.model.architecture}, {num_parameters / 1e6:.2f}M parameters, {self.device}, "
            f"{str(self.dtype).removeprefix('torch.')}; {train.steps} steps of "
            f"{train.rows_per_step * self.recipe.model.context:,} tokens = "
            f"{tokens / self.shards.facts.train.num_tokens:.1f} epochs; from step {self.step}"
        )


def open_run(recipe: Recipe, *, workers: Workers = ALONE) -> Run:
    """Open the data, build the model, and put back the last checkpoint.

    Raises:
        ConfigurationError: the data, the recipe, the run folder or the number of processes do not fit.
    """
    share = recipe.train.accumulation * workers.count
    if recipe.train.rows_per_step % share:
        raise ConfigurationError(
            f"train.rows_per_step {recipe.train.rows_per_step} is no multiple of {workers.count} processes times "
            f"train.accumulation {recipe.train.accumulation}"
        )
    shards = open_shards(Path(recipe.data))
    tokenizer = load_tokenizer(shards.folder)
    device = workers.device
    seed, context = recipe.train.seed, recipe.model.context
    model = build_model(
        recipe.model,
        vocab_size=shards.facts.vocab_size,
        start_id=special_id(tokenizer, START),
        end_id=special_id(tokenizer, END),
        seed=seed,
    ).to(device)
    torch.manual_seed(seed + workers.rank)  # each process drops out units of its own
    optimizer = make_optimizer(model, recipe.train)
    folder = Path(recipe.run.folder)
    if workers.is_first:
        _make_folder(folder, recipe)
    rows, heldout = (PackedRows(split, context=context, seed=seed) for split in (shards.train, shards.heldout))
    step, seconds = _restore(model, optimizer, shards, recipe)
    return Run(
        recipe=recipe,
        shards=shards,
        tokenizer=tokenizer,
        model=model,
        forward=_compiled(model) if recipe.train.compile else model,
        optimizer=optimizer,
        workers=workers,
        dtype=choose_dtype(recipe.train, device),
        rows=rows,
        heldout=heldout,
        metrics=MetricsFile(folder / "metrics.jsonl" if workers.is_first else Path(os.devnull), resumed_step=step),
        step=step,
        seconds=seconds,
    )


def _compiled(model: PreTrainedModel) -> nn.Module:
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def train_step(run: Run) -> tuple[float, float]:
    """One step of the optimiser: (loss in nats a token, norm of the gradient before clipping).

    Raises:
        TrainingStopped: the loss or the norm is no finite number; the weights are those before the step.
    """
    train, workers = run.recipe.train, run.workers
    count = train.rows_per_step // train.accumulation // workers.count
    first = run.step * train.rows_per_step
    own = first + workers.rank * count * train.accumulation
    pieces = [run.rows.rows(own + index * count, count) for index in range(train.accumulation)]
    (num_labels,) = workers.sum([float(sum((piece.labels != NO_LABEL).sum() for piece in pieces))])
    rate = learning_rate(train.schedule, run.step, steps=train.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss, mixed = 0.0, autocast(run.dtype, run.device)
    for piece in pieces:
        with mixed():
            logits = packed_logits(run.forward, piece, device=run.device, dtype=run.dtype)
        piece_loss = summed_loss(logits, piece) / num_labels
        piece_loss.backward()
        loss += float(piece_loss.detach())
    workers.sum_gradients(run.model.parameters())
    loss, num_stopping = workers.sum([loss, float(run.is_stopping)])
    run.is_stopping = num_stopping > 0  # all of them end after the same step
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), train.clip_norm))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise _not_finite(run, loss=loss, first=first)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss, norm


def heldout_loss(run: Run) -> float:
    """Mean loss over the first rows of the held-out split, nats a token."""
    count = min(run.recipe.run.evaluate_rows, run.heldout.rows_per_epoch)
    total, num_labels, mixed = 0.0, 0, autocast(run.dtype, run.device)
    run.model.eval()
    with torch.no_grad():
        for first in range(0, count, _EVALUATION_ROWS):
            rows = run.heldout.rows(first, min(_EVALUATION_ROWS, count - first))
            with mixed():
                logits = packed_logits(run.model, rows, device=run.device, dtype=run.dtype)
            total += float(summed_loss(logits, rows))
            num_labels += int((rows.labels != NO_LABEL).sum())
    run.model.train()
    return total / num_labels


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is. Raises TrainingStopped where that fails."""
    state = CheckpointState(
        step=run.step,
        seconds=run.elapsed,
        recipe=msgspec.Raw(msgspec.json.encode(run.recipe)),
        tokenizer_sha256=run.shards.facts.tokenizer_sha256,
    )
    checkpoint = Checkpoint(
        state=state,
        weights=dict(run.model.named_parameters()),
        moments=optimizer_tensors(run.optimizer, run.model),
        random_state=torch.get_rng_state(),
    )
    try:
        return save_checkpoint(run.folder / "checkpoints", checkpoint, keep=run.recipe.run.keep_checkpoints)
    except OSError as error:
        raise TrainingStopped(
            f"the checkpoint of step {run.step} cannot be written: {error}. {_last_good(run)}"
        ) from error


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
    run.metrics.close()
    if not run.workers.is_first:
        return None
    write_report(run.folder)
    if run.step < run.recipe.train.steps:
        display.line(f"stopped after step {run.step}; the same command goes on from there")
        return None
    target = run.folder / "model"
    dtype = torch.bfloat16 if run.recipe.run.save_dtype == "bfloat16" else torch.float32
    try:
        export_model(run.model, run.shards.folder, target, dtype=dtype)
    except OSError as error:
        raise TrainingStopped(f"the model cannot be written: {error}. {_last_good(run)}") from error
    return target


def _log_step(run: Run, *, loss: float, norm: float, tokens_per_second: float) -> str:
    rate = run.optimizer.param_groups[0]["lr"]
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


def _make_folder(folder: Path, recipe: Recipe) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_bytes(msgspec.json.format(msgspec.json.encode(recipe)) + b"\n")
    except OSError as error:
        raise ConfigurationError(f"the run folder {folder} cannot be written: {error}") from error


def _restore(model: PreTrainedModel, optimizer: torch.optim.AdamW, shards: Shards, recipe: Recipe) -> tuple[int, float]:
    """Put the last checkpoint back: (steps done, seconds trained)."""
    folder = Path(recipe.run.folder) / "checkpoints"
    path = last_checkpoint(folder)
    if path is None:
        shutil.rmtree(folder, ignore_errors=True)
        return 0, 0.0
    checkpoint = load_checkpoint(path)
    state = checkpoint.state
    _require_same(path, state, shards, recipe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.weights[name])
    restore_optimizer(optimizer, model, checkpoint.moments, step=state.step)
    torch.set_rng_state(checkpoint.random_state)
    return state.step, state.seconds


def _require_same(path: Path, state: CheckpointState, shards: Shards, recipe: Recipe) -> None:
    before = msgspec.json.decode(state.recipe, type=Recipe)
    if state.tokenizer_sha256 != shards.facts.tokenizer_sha256:
        raise ConfigurationError(
            f"{path} was trained with another tokenizer than {shards.folder} has; use a new run folder"
        )
    for table in ("model", "train"):
        for name in getattr(recipe, table).__struct_fields__:
            old, new = getattr(getattr(before, table), name), getattr(getattr(recipe, table), name)
            if old != new and name not in _MAY_CHANGE:
                raise ConfigurationError(
                    f"{path} was made with {table}.{name} = {old!r}, the recipe now says {new!r}; "
                    "put it back, or use a new run folder"
                )


_MAY_CHANGE = frozenset(["steps", "threads", "schedule", "compile"])
"""When a run is resumed: a longer run, an earlier decay."""


def _not_finite(run: Run, *, loss: float, first: int) -> TrainingStopped:
    last = first + run.recipe.train.rows_per_step - 1
    return TrainingStopped(
        f"the loss of step {run.step + 1} is {loss} (rows {first} to {last}, learning rate "
        f"{run.optimizer.param_groups[0]['lr']:.2e}). {_last_good(run)}; lower the learning rate or clip_norm there"
    )


def _last_good(run: Run) -> str:
    path = last_checkpoint(run.folder / "checkpoints")
    return "There is no checkpoint yet" if path is None else f"The last good checkpoint is {path}"


@contextmanager
def _stop_signals(run: Run) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        run.is_stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
