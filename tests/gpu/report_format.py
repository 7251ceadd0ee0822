"""What `make gpu-report` writes: docs/gpu/<card>.json. Decoded with these types, an unknown field is an error."""

import msgspec


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    card: str
    driver: str | None
    capability: str | None
    memory_gib: float | None
    read_gb_per_s: float
    """Measured: a sum over a large tensor."""
    torch: str
    cuda: str | None
    transformers: str
    triton: str | None


class Tests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of tests/gpu and of the Triton kernels."""

    passed: int
    failed: int
    skipped: int


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode steps, forward and draw together."""

    model: str
    is_deterministic: bool
    batch: int
    context: int
    step_ms: float
    """The median."""
    step_p90_ms: float
    tokens_per_second: float
    bandwidth_share: float
    """Bytes of the weights a second over what the card reads a second."""


class Prefill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    is_deterministic: bool
    tokens: int
    ms: float


class Throughput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Streams that begin together, against transformers' continuous batching in the same process."""

    streams: int
    tokens_per_second: float
    transformers_tokens_per_second: float | None
    """None in a dry run: it needs a card."""


class Restart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kill of the engine in the middle of a stream, to the next token of the stream."""

    model: str
    seconds: float
    has_same_text: bool
    """As the same request without a kill; promised with `--deterministic`, which is on here."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the project means to reach on a card."""

    name: str
    wanted: str
    measured: float | None
    is_met: bool | None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    is_dry_run: bool
    date: str
    machine: Machine
    tests: Tests
    steps: tuple[Step, ...]
    prefills: tuple[Prefill, ...]
    throughputs: tuple[Throughput, ...]
    restarts: tuple[Restart, ...]
    targets: tuple[Target, ...]
    failures: dict[str, str]
    """By section, why it has no figures."""
