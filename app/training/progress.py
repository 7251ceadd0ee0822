"""The progress bar and lines of a run, on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SAMPLE_CHARACTERS = 300


class RunDisplay:
    """What a person sees. Without a terminal the bar is left out and each log step is a line."""

    def __init__(self, console: Console, bar: Progress, *, steps: int, done: int) -> None:
        self._console = console
        self._bar = bar
        self._task = bar.add_task("train", total=steps, completed=done, figures="")

    def step(self, step: int, *, figures: str | None) -> None:
        """After each step; `figures` where it is one that is logged."""
        if figures is None:
            self._bar.update(self._task, completed=step)
            return
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal:
            self.line(f"step {step}: {figures}")

    def line(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def sample(self, step: int, text: str) -> None:
        """A sample, on one line."""
        self.line(f"step {step} sample: {text[:_SAMPLE_CHARACTERS]!r}")


@contextmanager
def run_display(*, steps: int, done: int, is_shown: bool = True) -> Iterator[RunDisplay]:
    """Show a bar for the length of a run."""
    console = Console(stderr=True, quiet=not is_shown)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield RunDisplay(console, bar, steps=steps, done=done)
