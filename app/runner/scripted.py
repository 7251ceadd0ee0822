"""The scripted tier: a decoder without weights, for tests and benchmarks of everything around the decoder.

The next token is a function of all tokens before it (and of the seed, where the temperature is not 0),
so that a sequence goes on with the same tokens after a hand-over, a preemption or a cache hit, and
whoever gets the context wrong gets other tokens. It can also be told to be slow or to fail.

Invariant: rows share nothing. Imports neither numpy nor torch.
"""

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Literal, NoReturn

import msgspec

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.memory import EngineMemory
from app.core.plan import LogitsNeed, PlanEntry, RowResult, RowStart, StepPlan, StepResult
from app.core.types import SamplingParams, TokenLogprobs
from app.runner.base import Bitmask, RunnerInfo, StepMasks

_MASK = (1 << 64) - 1
_MULTIPLIER = 6364136223846793005
_INCREMENT = 1442695040888963407


class ScriptedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `EngineConfig.scripted` may say. Values of the EngineConfig itself come before these."""

    vocab_size: int = 1000
    max_model_len: int = 4096
    num_kv_blocks: int = 1024
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    load_seconds: float = 0.0
    """Loading takes so long."""
    step_seconds: float = 0.0
    """Each forward pass takes so long."""
    tokens: str = ""
    """Token ids divided by commas: outputs go round them in place of made-up tokens."""
    eos_after: int = -1
    """Draw an EOS token as output token number `eos_after` (from 0), where one is known."""
    fail_on_token: int = -1
    """A row whose prompt ends in this token fails alone (`RowResult.error`)."""
    crash_on_token: int = -1
    """A row whose prompt ends in this token ends the process in the way of `crash`."""
    trigger_after: int = 0
    """fail_on_token and crash_on_token strike when so many output tokens are there."""
    crash: Literal["exit", "segv", "raise", "hang"] = "exit"
    fail_load: Literal["", "configuration", "exit", "raise"] = ""
    """End the load in this way."""
    memory_file: str = ""
    """A file that says how many KV blocks there is memory for at this load: so many where none are asked for, and
    more are refused."""


class _Row:
    """The tokens so far of one running sequence, as a hash of them."""

    __slots__ = ("context", "length", "num_prompt", "params", "prompt", "trigger")

    def __init__(self, start: RowStart, num_computed: int) -> None:
        token_ids = start.prompt_token_ids + start.output_token_ids
        self.params = start.params
        self.prompt = start.prompt_token_ids
        self.num_prompt = len(start.prompt_token_ids)
        self.trigger = start.prompt_token_ids[-1] if start.prompt_token_ids else -1
        self.context = 0
        self.length = 0
        self.extend(0, token_ids[:num_computed])

    def extend(self, start: int, token_ids: tuple[int, ...]) -> None:
        if start != self.length:
            raise RuntimeError(f"a plan computes from position {start} where {self.length} tokens were computed")
        context = self.context
        for token_id in token_ids:
            context = ((context ^ token_id) * _MULTIPLIER + _INCREMENT) & _MASK
        self.context = context
        self.length += len(token_ids)


class ScriptedForward(msgspec.Struct, frozen=True):
    """Nothing: the rows know all."""

    step_id: int


class ScriptedRunner:
    """A `ModelRunner` that computes nothing."""

    def __init__(self, config: EngineConfig) -> None:
        self._settings = settings = _settings(config)
        self._cycle = _token_cycle(settings)
        self._eos_token_ids = frozenset(config.eos_token_ids)
        self._rows: dict[int, _Row] = {}
        time.sleep(settings.load_seconds)
        if settings.fail_load:
            _fail_load(settings.fail_load)
        self._info = _info(config, settings)

    @property
    def info(self) -> RunnerInfo:
        """Fixed from load to exit."""
        return self._info

    def forward(self, plan: StepPlan) -> ScriptedForward:
        """Append the plan's tokens to the rows."""
        if self._settings.step_seconds > 0:
            time.sleep(self._settings.step_seconds)
        for row in plan.released_rows:
            self._rows.pop(row, None)
        for entry in plan.entries:
            if entry.start_row is not None:
                self._rows[entry.row] = _Row(entry.start_row, entry.start)
            self._rows[entry.row].extend(entry.start, entry.token_ids)
        return ScriptedForward(plan.step_id)

    def guesses(self, plan: StepPlan, forward: ScriptedForward) -> dict[int, int]:
        """None."""
        return {}

    def sample(self, plan: StepPlan, forward: ScriptedForward, masks: StepMasks | None = None) -> StepResult:
        """Make up the next tokens; where a mask forbids one, the next higher id that it allows takes its place."""
        by_row: StepMasks = {} if masks is None else masks
        rows = tuple(self._sample_row(entry, by_row.get(entry.row)) for entry in plan.entries)
        return StepResult(forward.step_id, rows)

    def close(self) -> None:
        """Forget the rows."""
        self._rows.clear()

    def _sample_row(self, entry: PlanEntry, mask: "Bitmask | None") -> RowResult:
        row = self._rows[entry.row]
        prompt_logprobs = self._score_prompt(row, entry) if entry.logits is LogitsNeed.ALL else ()
        if not entry.sample:
            return RowResult(entry.row, prompt_logprobs=prompt_logprobs)
        num_output = row.length - row.num_prompt
        if num_output == self._settings.trigger_after:
            if row.trigger == self._settings.crash_on_token:
                _crash(self._settings.crash)
            if row.trigger == self._settings.fail_on_token:
                return RowResult(entry.row, error=f"the script fails on token {row.trigger}")
        token_id = self._draw(row, num_output, mask)
        if token_id is None:
            return RowResult(
                entry.row, error="the mask and min_tokens together leave no token to draw", is_request_fault=True
            )
        k = row.params.num_logprobs
        logprobs = () if k is None else (self._logprobs(token_id, k),)
        return RowResult(entry.row, token_ids=(token_id,), logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _draw(self, row: _Row, num_output: int, mask: "Bitmask | None") -> int | None:
        params = row.params
        may_end = bool(self._eos_token_ids) and not params.ignore_eos and num_output >= params.min_tokens
        eos = min(self._eos_token_ids, default=0)
        if may_end and num_output == self._settings.eos_after and _allows(mask, eos):
            return eos
        if self._cycle:
            return self._next_allowed(self._cycle[num_output % len(self._cycle)], avoided=(), mask=mask)
        stops = params.stop_token_ids if num_output < params.min_tokens else ()
        token_id = _mix(row.context ^ _salt(params)) % self._info.vocab_size
        return self._next_allowed(token_id, avoided=(*self._eos_token_ids, *stops), mask=mask)

    def _next_allowed(self, token_id: int, *, avoided: tuple[int, ...], mask: "Bitmask | None") -> int | None:
        """The first from `token_id` upwards, and round, that may be drawn."""
        for _ in range(self._info.vocab_size):
            if token_id not in avoided and _allows(mask, token_id):
                return token_id
            token_id = (token_id + 1) % self._info.vocab_size
        return None

    def _score_prompt(self, row: _Row, entry: PlanEntry) -> tuple[TokenLogprobs, ...]:
        k = row.params.num_prompt_logprobs
        end = min(entry.start + len(entry.token_ids), row.num_prompt - 1)
        return tuple(
            self._logprobs(row.prompt[position], 0 if k is None else k) for position in range(entry.start + 1, end + 1)
        )

    def _logprobs(self, token_id: int, k: int) -> TokenLogprobs:
        """The token itself is the most likely one; then come the next higher ids."""
        vocab_size = self._info.vocab_size
        top = tuple((token_id + index) % vocab_size for index in range(min(k, vocab_size)))
        best = -1.0 - (token_id % 64) / 64
        return TokenLogprobs(best, 1, top, tuple(best - index for index in range(len(top))))


def load(config: EngineConfig, _memory: EngineMemory | None = None) -> ScriptedRunner:
    """The tier's entry point. Raises ConfigurationError for settings that do not exist."""
    return ScriptedRunner(config)


def _settings(config: EngineConfig) -> ScriptedSettings:
    try:
        return msgspec.convert(config.scripted, ScriptedSettings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"setting of the scripted tier: {error}") from None


def _token_cycle(settings: ScriptedSettings) -> tuple[int, ...]:
    try:
        cycle = tuple(int(part) for part in settings.tokens.split(",") if part.strip())
    except ValueError:
        raise ConfigurationError(f"scripted tokens {settings.tokens!r}: give ids divided by commas") from None
    if any(not 0 <= token_id < settings.vocab_size for token_id in cycle):
        raise ConfigurationError(f"scripted tokens {settings.tokens!r}: ids go from 0 to {settings.vocab_size - 1}")
    return cycle


def _info(config: EngineConfig, settings: ScriptedSettings) -> RunnerInfo:
    def first(asked: int | None, otherwise: int) -> int:
        return otherwise if asked is None else asked

    room = int(Path(settings.memory_file).read_text()) if settings.memory_file else None
    num_kv_blocks = first(config.num_kv_blocks, first(room, settings.num_kv_blocks))
    if room is not None and num_kv_blocks > room:
        raise ConfigurationError(f"{num_kv_blocks} KV blocks are asked for and the script has memory for {room}")
    return RunnerInfo(
        tier="scripted",
        tier_reason="tokens are made up, there is no model",
        device="cpu",
        dtype="none",
        vocab_size=settings.vocab_size,
        max_model_len=min(settings.max_model_len, first(config.max_model_len, settings.max_model_len)),
        num_kv_blocks=num_kv_blocks,
        block_size=first(config.block_size, settings.block_size),
        kv_bytes=0,
        weight_bytes=0,
        max_num_batched_tokens=first(config.max_num_batched_tokens, settings.max_num_batched_tokens),
        row_independent=True,
        fingerprint=_fingerprint(Path(config.model_dir) / "config.json"),
    )


def _fingerprint(config_file: Path) -> str:
    """Of the model that is not read, so far as there is one: another folder is another model here too."""
    digest = hashlib.sha256(config_file.read_bytes()).hexdigest()[:8] if config_file.is_file() else ""
    return f"scripted-1-{digest}" if digest else "scripted-1"


def _allows(mask: "Bitmask | None", token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 32] >> (token_id % 32) & 1)


def _salt(params: SamplingParams) -> int:
    return 0 if params.temperature == 0 else _mix(params.seed + 1)


def _mix(value: int) -> int:
    """Spread 64 bits over 64 bits (the finaliser of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _fail_load(how: str) -> NoReturn:
    if how == "configuration":
        raise ConfigurationError("the script says that this model cannot be served; take another script")
    if how == "raise":
        raise RuntimeError("the script fails the load")
    os._exit(12)


def _crash(how: str) -> NoReturn:
    if how == "raise":
        raise RuntimeError("the script crashes here")
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    while how == "hang":
        time.sleep(3600)
    os._exit(13)
