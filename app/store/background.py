"""Finding a model in a thread, so that the server can answer, and end, while a model is fetched or converted."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from app.store.folder import ModelFolder

Report = Callable[[str], None]


class Resolution:
    """A model on its way. The thread is a daemon: nobody waits for it at the end of the process."""

    def __init__(self, find: Callable[[Report], ModelFolder], *, name: str, report: Report) -> None:
        """Begins at once. `find` and `report` are called in the thread."""
        self._find = find
        self._report = report
        self._detail = f"looking for {name}"
        self.folder: Future[ModelFolder] = Future()
        """The folder, or what `find` raised."""
        self._thread = threading.Thread(target=self._run, name="resolve-model", daemon=True)
        self._thread.start()

    @property
    def detail(self) -> str:
        """What it is at, in words."""
        return self._detail

    def wait(self, seconds: float) -> bool:
        """Whether it is done after so long."""
        self._thread.join(seconds)
        return self.folder.done()

    def give_up(self) -> None:
        """End what it started, of this process's children; partial files go on where they are another time."""
        if self.folder.done():
            return
        for pid in _children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _run(self) -> None:
        self.folder.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            self.folder.set_result(self._find(self._note))
        except BaseException as error:  # whoever waits for the folder raises it
            self.folder.set_exception(error)

    def _note(self, text: str) -> None:
        self._detail = text
        self._report(text)


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found
