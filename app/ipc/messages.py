"""Messages between the API process and the engine process: one tagged msgspec union each way.

Every message of the engine carries its generation and a sequence number that rises by one: a gap, a
repeat or a frame that does not decode counts as the engine's death.
"""

import msgspec

from app.core.config import EngineConfig
from app.core.types import EngineLimits, EngineOutput, EngineRequest, StepStats


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message to an engine: who it is and what to load."""

    generation: int
    config: EngineConfig
    num_descriptors: int = 0
    """How many came beside this message (SCM_RIGHTS): those of `EngineMemory`, in its order, or none."""


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Take these sequences into the waiting queue."""

    requests: tuple[EngineRequest, ...]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Drop these sequences; nothing is answered. Unknown ids are ignored."""

    request_ids: tuple[str, ...]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded."""

    generation: int
    seq: int
    limits: EngineLimits


class StepOutputs(msgspec.Struct, frozen=True, tag="step"):
    """All that one step brought, for all sequences."""

    generation: int
    seq: int
    outputs: tuple[EngineOutput, ...]
    stats: StepStats


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on and says why before it exits."""

    generation: int
    seq: int
    reason: str
    is_configuration: bool
    """True: a restart would fail the same way (model or settings), so the server should exit."""


ToEngine = Start | Add | Abort
FromEngine = Ready | StepOutputs | Fatal
