"""An engine that can be told to fail: wraps runner and transport of `app.engine`, which knows nothing of faults.

`python -m loadtest.faulty_engine CONTROL_FILE --socket-fd N --progress-fd M`, started through
`EngineLaunch.command`. While CONTROL_FILE exists it names one fault (`Fault` as JSON). The engine strikes once, when
the phase comes: it takes the file away first, so the engine that replaces it does not fail the same way.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

import app.engine.__main__ as engine_main
from app.core.config import EngineConfig
from app.core.memory import EngineMemory
from app.core.plan import PlanEntry, StepPlan, StepResult
from app.core.types import EngineRequest
from app.engine.build import Engine, build_engine
from app.grammar.constraints import Constraints
from app.grammar.constraints import _Preparer as Preparer
from app.ipc.messages import Abort, FromEngine, ToEngine
from app.ipc.transport import EngineEnd, encode_frame
from app.runner.base import Forward, ModelRunner, RunnerInfo

Kind = Literal[
    "sigkill",
    "sigstop",
    "sigsegv",
    "sigabrt",
    "exit",
    "exception",
    "memory",
    "hang",
    "row_error",
    "grammar_crash",
    "frame_lost",
    "frame_doubled",
    "frame_corrupt",
]
Phase = Literal["start", "idle", "prepare", "prefill", "chunked_prefill", "decode", "last_token", "abort"]
"""`prepare`: while a thread of its own compiles a grammar."""
GRAMMAR_CRASH = "grammar_crash"
"""The library of grammars ends the process: in the thread that prepares, while a mask is computed, or at an abort."""
FRAMES = ("frame_lost", "frame_doubled", "frame_corrupt")
ROW_PHASES: tuple[Phase, ...] = ("prefill", "chunked_prefill", "decode", "last_token")
STDERR_VARIABLE = "LOADTEST_ENGINE_STDERR"


class Fault(msgspec.Struct, frozen=True):
    """What to do, once, and when."""

    kind: Kind
    phase: Phase
    target: int = -1
    """The last prompt token of the request in whose steps it happens; -1: of any request."""
    repeat: bool = False
    """Strike whenever the phase comes: a request that ends every engine."""


class Control:
    """The control file. Reading it costs one system call while nothing is armed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.spoiled: Kind | None = None
        """What to do with the next frame that is sent."""
        self.due_in_masks: Fault | None = None
        """What to do where this step's masks are computed."""

    def armed(self, *phases: Phase) -> Fault | None:
        """The fault, if one of these phases is its own."""
        fault = self._read()
        return fault if fault is not None and fault.phase in phases and fault.kind != GRAMMAR_CRASH else None

    def armed_in_grammar(self, *phases: Phase) -> Fault | None:
        """The same for a fault that strikes where grammars are at work, and nowhere else."""
        fault = self._read()
        return fault if fault is not None and fault.phase in phases and fault.kind == GRAMMAR_CRASH else None

    def _read(self) -> Fault | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Fault)
        except (OSError, msgspec.DecodeError):
            return None

    def strike(self, fault: Fault) -> None:
        """Do it, or have it done to the next frame; nothing where it was done already."""
        if not fault.repeat:
            try:
                self._path.unlink()
            except OSError:
                return
        if fault.kind in FRAMES:
            self.spoiled = fault.kind
        else:
            strike(fault)


class FaultyEnd(EngineEnd):
    """A transport that loses, doubles or spoils a frame, and strikes while the engine is idle or told to abort."""

    def __init__(self, sock: socket.socket, control: Control) -> None:
        super().__init__(sock)
        self._raw = sock
        self._control = control
        self._num_idle = 0
        self._has_abort = False

    def receive(self, timeout: float | None = 0.0) -> list[ToEngine]:
        if timeout is None and (fault := self._control.armed("idle")) and self._num_idle:
            self._control.strike(fault)
        self._num_idle += timeout is None
        messages = super().receive(timeout)
        if any(isinstance(message, Abort) for message in messages) and (fault := self._control.armed("abort")):
            self._control.strike(fault)
        return messages

    def send(self, message: FromEngine) -> None:
        spoiled, self._control.spoiled = self._control.spoiled, None
        if spoiled is None:
            super().send(message)
        elif spoiled == "frame_doubled":
            super().send(message)
            super().send(message)
        elif spoiled == "frame_corrupt":
            frame = bytearray(encode_frame(message))
            frame[len(frame) // 2] ^= 0xFF
            frame[5] ^= 0xFF
            self.flush(timeout=1.0)
            self._raw.setblocking(True)
            self._raw.sendall(frame)
            self._raw.setblocking(False)


class FaultyRunner:
    """A `ModelRunner` that strikes in `forward`, or lets one row fail."""

    def __init__(self, runner: ModelRunner, control: Control) -> None:
        self._runner = runner
        self._control = control
        self._rows: dict[int, tuple[int, int, int]] = {}
        """Of each row: last prompt token, prompt length, max_tokens."""
        self._failing: int | None = None

    @property
    def info(self) -> RunnerInfo:
        return self._runner.info

    def forward(self, plan: StepPlan) -> Forward:
        for entry in plan.entries:
            if (start := entry.start_row) is not None:
                prompt = start.prompt_token_ids
                self._rows[entry.row] = (prompt[-1], len(prompt), start.params.max_tokens)
        in_grammar = self._control.armed_in_grammar(*ROW_PHASES)
        if in_grammar is not None and any(self._is_due(in_grammar, entry) for entry in plan.entries):
            self._control.due_in_masks = in_grammar
        fault = self._control.armed(*ROW_PHASES, "abort")
        if fault is not None:
            for entry in plan.entries:
                if self._is_due(fault, entry):
                    if fault.kind == "row_error":
                        self._failing = entry.row
                    self._control.strike(fault)
        return self._runner.forward(plan)

    def guesses(self, plan: StepPlan, forward: Forward) -> Mapping[int, int]:
        return self._runner.guesses(plan, forward)

    def sample(self, plan: StepPlan, forward: Forward, *more: Any) -> StepResult:
        result = self._runner.sample(plan, forward, *more)
        if self._failing is None:
            return result
        failing, self._failing = self._failing, None
        rows = tuple(
            msgspec.structs.replace(row, token_ids=(), logprobs=(), error="the logits are not finite")
            if row.row == failing
            else row
            for row in result.rows
        )
        return msgspec.structs.replace(result, rows=rows)

    def close(self) -> None:
        self._runner.close()

    def _is_due(self, fault: Fault, entry: PlanEntry) -> bool:
        last, num_prompt, max_tokens = self._rows[entry.row]
        if fault.target not in (-1, last) or fault.phase == "abort":
            return False
        end = entry.start + len(entry.token_ids)
        match fault.phase:
            case "chunked_prefill":
                return end < num_prompt
            case "prefill":
                return end == num_prompt
            case "decode":
                return end > num_prompt + 2
            case "last_token":
                return end == num_prompt + max_tokens - 1
        return False


def strike(fault: Fault) -> None:
    """End, stop or break this process."""
    match fault.kind:
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sigstop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sigsegv" | "grammar_crash":
            ctypes.string_at(0)
        case "sigabrt":
            os.abort()
        case "exit":
            os._exit(0)
        case "exception":
            raise RuntimeError("injected")
        case "memory":
            raise MemoryError("injected")
        case "hang":
            time.sleep(3600)


def main() -> int:
    """`app.engine` with both wrapped."""
    control = Control(Path(sys.argv.pop(1)))
    if STDERR_VARIABLE not in os.environ:  # thousands of crashes on purpose
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _wrap(control)
    return engine_main.main()


def _wrap(control: Control) -> None:
    def build(config: EngineConfig, memory: EngineMemory) -> Engine:
        if fault := control.armed("start"):
            control.strike(fault)
        engine = build_engine(config, memory)
        return msgspec.structs.replace(engine, runner=FaultyRunner(engine.runner, control))

    def end(sock: socket.socket) -> EngineEnd:
        return FaultyEnd(sock, control)

    replaced: dict[str, Callable[..., object]] = {"build_engine": build, "EngineEnd": end}
    for name, value in replaced.items():
        setattr(engine_main, name, value)
    _wrap_grammars(control)


def _wrap_grammars(control: Control) -> None:
    """Strike where the library of grammars is called."""
    prepare_soundly, masks_soundly, forget_soundly = Preparer._run, Constraints.masks, Constraints.forget

    def prepare(preparer: Preparer, request: EngineRequest, tell: Callable[[Any], None]) -> None:
        fault = control.armed("prepare") or control.armed_in_grammar("start", "idle")
        if fault is not None and fault.target in (-1, request.prompt_token_ids[-1]):
            preparer._note(request.request_id)
            control.strike(fault)
        prepare_soundly(preparer, request, tell)

    def masks(constraints: Constraints, plan: StepPlan, *more: Any) -> Any:
        if control.due_in_masks is not None:
            control.strike(control.due_in_masks)
        return masks_soundly(constraints, plan, *more)

    def forget(constraints: Constraints, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        fault = control.armed_in_grammar("abort")
        if fault is not None and any(request_id in constraints._sequences for request_id in ids):
            control.strike(fault)
        forget_soundly(constraints, ids)

    Preparer._run = prepare  # type: ignore[assignment,method-assign]
    Constraints.masks, Constraints.forget = masks, forget  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    sys.exit(main())
