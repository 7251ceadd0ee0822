"""`python -m loadtest.bench_grammar`: what constrained rows cost the batch that they are in.

In one process, without HTTP: a scheduler, the native tier and the grammars of the engine. Rounds of decoding
steps with 32 plain rows, 16 plain and 16 constrained ones, and 32 constrained ones take turns, so that a change of
the machine's pace meets all three; the figure is the median step of each and the median over rounds of
its ratio to the plain one. All rows are drawn in the same way (`--rows`) and never end. With `--threads 1` the clock
is this thread's own CPU time, which other programs hardly change.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import msgspec

from app.core.config import EngineConfig
from app.core.types import EngineRequest, SamplingParams
from app.engine.build import Engine, build_engine
from app.grammar import source
from app.store import list_models, resolve
from loadtest.row_kinds import ROW_KINDS, drawn_as

logger = logging.getLogger("loadtest")

NUM_ROWS = 32
MIXES = {"32 plain": 0, "16 plain + 16 grammar": 16, "32 grammar": 32}
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["first", "second", "third"]},
        "amount": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["name", "kind", "amount", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": RECORD, "minItems": 10_000}
PROMPT_TOKENS = 64
PARTS = ("schedule", "forward", "masks", "sample", "accept", "apply")
Clock = Callable[[], float]


class Batch:
    """One mix of rows, decoding for as long as it is asked to."""

    def __init__(self, engine: Engine, clock: Clock, *, num_grammars: int, rows: str, max_tokens: int) -> None:
        self._engine, self._clock = engine, clock
        self.spent: dict[str, list[float]] = {part: [] for part in PARTS}
        self._grammars = engine.grammars(wake=lambda: None, note_preparing=lambda _: None)
        for index in range(NUM_ROWS):
            self._add(_request(index, is_plain=index >= num_grammars, rows=rows, max_tokens=max_tokens))
        self._wait_prepared(num_grammars)

    def step(self) -> float:
        """Seconds of one step."""
        engine, times = self._engine, [self._clock()]
        plan = engine.scheduler.schedule(times[0])
        assert plan is not None
        times.append(self._clock())
        forward = engine.runner.forward(plan)
        times.append(self._clock())
        masks = self._grammars.masks(plan, partial(engine.runner.guesses, plan, forward))
        times.append(self._clock())
        result = engine.runner.sample(plan, forward, masks)
        times.append(self._clock())
        result = self._grammars.accept(plan, result)
        times.append(self._clock())
        outputs = engine.scheduler.apply(plan, result, times[0])
        times.append(self._clock())
        assert all(output.finish_reason is None for output in outputs), outputs
        for part, begin, end in zip(PARTS, times, times[1:], strict=False):
            self.spent[part].append(end - begin)
        return times[-1] - times[0]

    def close(self) -> None:
        """Abort all rows."""
        request_ids = [str(index) for index in range(NUM_ROWS)]
        self._engine.scheduler.abort(request_ids)
        self._grammars.forget(request_ids)

    def _add(self, request: EngineRequest) -> None:
        assert self._engine.scheduler.add(request, 0.0) is None
        self._grammars.begin(request)

    def _wait_prepared(self, count: int) -> None:
        while count:
            for prepared in self._grammars.take_prepared():
                assert prepared.error is None, prepared.error
                self._engine.scheduler.admit_prepared(prepared.request_id)
                count -= 1
            time.sleep(0.001)


def _request(index: int, *, is_plain: bool, rows: str, max_tokens: int) -> EngineRequest:
    params = drawn_as(rows, SamplingParams(seed=index, max_tokens=max_tokens, ignore_eos=True))
    if not is_plain:
        params = msgspec.structs.replace(params, grammar=source.json_schema(ENDLESS))
    prompt = tuple(1000 + (index * 131 + position * 17) % 20_000 for position in range(PROMPT_TOKENS))
    return EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params)


def _round(engine: Engine, num_grammars: int, options: argparse.Namespace) -> dict[str, float]:
    """The median decoding step and the median of each part, in seconds."""
    max_tokens = options.steps + options.warmups + PROMPT_TOKENS
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    batch = Batch(engine, clock, num_grammars=num_grammars, rows=options.rows, max_tokens=max_tokens)
    for _ in range(options.warmups):
        batch.step()
    times = [batch.step() for _ in range(options.steps)]
    batch.close()
    return {"step": median(times)} | {part: median(spent[-options.steps :]) for part, spent in batch.spent.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; 0, or 1 where there is no model."""
    options = _parser().parse_args(arguments)
    names = [str(options.model)] if options.model else [str(model.path) for model in list_models() if model.path]
    folders = [resolve(name, report=logger.info) for name in names[:1]]
    if not folders:
        sys.stderr.write("bench_grammar: no model is here; name a folder\n")
        return 1
    config = EngineConfig(
        model_dir=str(folders[0].path),
        eos_token_ids=folders[0].eos_token_ids,
        tier="native",
        max_num_seqs=NUM_ROWS,
        kv_cache_bytes=1 << 29,
        enable_prefix_caching=False,
        num_threads=options.threads,
    )
    engine = build_engine(config)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in MIXES}
    for _ in range(options.rounds):
        for name, num_grammars in MIXES.items():
            rounds[name].append(_round(engine, num_grammars, options))
    _show(rounds)
    engine.runner.close()
    return 0


def _show(rounds: dict[str, list[dict[str, float]]]) -> None:
    plain = rounds["32 plain"]
    for name, taken in rounds.items():
        ratio = median(one["step"] / base["step"] for one, base in zip(taken, plain, strict=True))
        step, *parts = (median(one[part] for one in taken) * 1e3 for part in ("step", *PARTS))
        told = "   ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in zip(PARTS, parts, strict=True))
        sys.stdout.write(f"{name:24} step p50 {step:7.2f} ms   {100 * (ratio - 1):+6.1f} %   {told}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_grammar", description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder; default: the first one of the cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="timed decoding steps of each round")
    parser.add_argument("--warmups", type=int, default=12, help="steps before them, prefill included")
    parser.add_argument("--rows", choices=list(ROW_KINDS), default="greedy", help="how tokens are drawn")
    parser.add_argument("--threads", type=int, help="default: as a server takes them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
