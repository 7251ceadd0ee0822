"""The engine's grammars without an engine: rows come, move and go, and nothing of them stays."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from app.core.plan import LogitsNeed, PlanEntry, RowResult, RowStart, StepPlan, StepResult
from app.core.types import EngineRequest, Grammar
from app.grammar import source
from app.grammar.constraints import Constraints, Prepared
from tests.fakes import make_request
from tests.text_tokenizers import byte_level

AB = source.regex("(ab){3}")
A, B = (byte_level().encode_now(letter, False)[0] for letter in "ab")


class Bench:
    """Constraints, and a wait for what they prepare."""

    def __init__(self, folder: Path, *, preparation_seconds: float = 30.0) -> None:
        self._woken = threading.Semaphore(0)
        self.noted: list[str | None] = []
        self.grammars = Constraints(
            folder,
            vocab_size=byte_level().vocab_size,
            eos_token_ids=(1,),
            wake=self._woken.release,
            note_preparing=self.noted.append,
            preparation_seconds=preparation_seconds,
        )

    def prepared(self) -> list[Prepared]:
        assert self._woken.acquire(timeout=30)
        return self.grammars.take_prepared()

    def begin(self, request_id: str, grammar: Grammar = AB) -> EngineRequest:
        request = make_request(request_id, [5])
        request = msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, grammar=grammar))
        self.grammars.begin(request)
        return request

    def ready(self, request_id: str) -> EngineRequest:
        request = self.begin(request_id)
        assert self.prepared() == [Prepared(request_id, None)]
        return request


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    byte_level()._library.save(str(tmp_path / "tokenizer.json"))
    return Bench(tmp_path)


def entry(row: int, request: EngineRequest | None = None, *, sample: bool = True) -> PlanEntry:
    start = None if request is None else RowStart(request.request_id, request.params, request.prompt_token_ids, ())
    return PlanEntry(row, 0, (5,), 0, (0,), 0, LogitsNeed.LAST if sample else LogitsNeed.NONE, sample, start)


def plan(*entries: PlanEntry, released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(1, entries, released)


def result(*rows: RowResult) -> StepResult:
    return StepResult(1, rows)


def forbids(mask: object) -> Callable[[int], bool]:
    return lambda token_id: not (mask[token_id // 32] >> (token_id % 32) & 1)  # type: ignore[index]


def test_nothing_happens_without_a_grammar(bench: Bench) -> None:
    grammars = bench.grammars
    request = make_request("plain", [5])
    grammars.begin(request)
    step = plan(entry(0, request))
    drawn = result(RowResult(0, (7,)))
    assert grammars.take_prepared() == [] and grammars.masks(step) is None and grammars.accept(step, drawn) is drawn
    grammars.forget(["plain"])


def test_a_guess_that_is_allowed_is_the_mask_and_another_changes_nothing(bench: Bench) -> None:
    grammars = bench.grammars
    step = plan(entry(0, bench.ready("a")), entry(1, bench.ready("b")), entry(2, bench.ready("c")))
    grammars.masks(step)  # the first ones were computed while they were prepared
    grammars.accept(step, result(*(RowResult(row, (A,)) for row in range(3))))
    step = plan(entry(0), entry(1), entry(2))
    masks = grammars.masks(step, lambda: {0: B, 1: A, 7: B})
    assert masks is not None and set(masks) == {0, 1, 2}
    for mask in masks.values():
        assert not forbids(mask)(B) and forbids(mask)(A)
    ends = result(*(RowResult(row, (B,)) for row in range(3)))
    assert grammars.accept(step, ends) == ends


def test_a_row_is_followed_from_its_start_to_its_end(bench: Bench) -> None:
    request, plain = bench.ready("a"), make_request("plain", [5])
    grammars = bench.grammars
    chunk = plan(entry(4, request, sample=False), entry(2, plain))
    assert grammars.masks(chunk) == {}
    assert grammars.accept(chunk, result(RowResult(4), RowResult(2, (9,)))) == result(RowResult(4), RowResult(2, (9,)))
    for token_id, other in [(A, B), (B, A)] * 2 + [(A, B)]:
        step = plan(entry(2), entry(4))
        masks = grammars.masks(step)
        assert masks is not None and set(masks) == {4}
        assert forbids(masks[4])(other) and not forbids(masks[4])(token_id)
        drawn = result(RowResult(2, (9,)), RowResult(4, (token_id,)))
        assert grammars.accept(step, drawn) == drawn
    step = plan(entry(4))
    grammars.masks(step)
    assert grammars.accept(step, result(RowResult(4, (B,)))) == result(RowResult(4, (B,), is_end=True))
    grammars.forget(["a"])
    assert grammars.masks(plan(entry(2))) is None


def test_a_preempted_sequence_goes_on_in_another_row(bench: Bench) -> None:
    request, grammars = bench.ready("a"), bench.grammars
    first = plan(entry(0, request))
    grammars.masks(first)
    grammars.accept(first, result(RowResult(0, (A,))))
    meanwhile = plan(entry(0, make_request("plain", [5])), released=(0,))
    assert not grammars.masks(meanwhile)
    drawn = result(RowResult(0, (B,)))
    assert grammars.accept(meanwhile, drawn) == drawn  # another's token in the row that it had
    again = grammars.masks(plan(entry(0), entry(3, request)))
    assert again is not None and set(again) == {3}
    assert forbids(again[3])(A) and not forbids(again[3])(B)


def test_a_row_of_one_that_has_ended_is_free_again(bench: Bench) -> None:
    request, plain, grammars = bench.ready("a"), make_request("plain", [5]), bench.grammars
    grammars.masks(plan(entry(0, request)))
    grammars.forget(["a"])
    assert grammars.masks(plan(entry(0, plain), released=(0,))) is None
    masks = grammars.masks(plan(entry(0), entry(1, bench.ready("b"))))
    assert masks is not None and set(masks) == {1}


def test_a_failed_row_keeps_its_own_error(bench: Bench) -> None:
    request, grammars = bench.ready("a"), bench.grammars
    step = plan(entry(0, request))
    grammars.masks(step)
    failed = result(RowResult(0, error="logits are not finite"))
    assert grammars.accept(step, failed) == failed


def test_a_token_that_the_grammar_forbids_is_an_error_of_the_row(bench: Bench) -> None:
    request, grammars = bench.ready("a"), bench.grammars
    step = plan(entry(0, request))
    grammars.masks(step)
    (row,) = grammars.accept(step, result(RowResult(0, (B,)))).rows
    assert row.token_ids == () and row.error is not None


def test_what_was_forgotten_while_it_was_prepared_is_never_ready(bench: Bench) -> None:
    bench.begin("gone")
    bench.grammars.forget(["gone"])
    bench.begin("wrong", source.lark("start: missing"))
    found: list[Prepared] = []
    while not found:
        found = bench.prepared()
    assert [one.request_id for one in found] == ["wrong"]
    assert found[0].error is not None and "missing" in found[0].error
    assert bench.grammars.masks(plan(entry(0, make_request("plain", [5])))) is None  # nothing is left


def test_who_is_prepared_is_noted_before_and_after(bench: Bench) -> None:
    for request_id in "ab":
        bench.ready(request_id)
    assert bench.noted == ["a", None, "b", None]


def test_one_can_be_prepared_before_anything_else_goes_on(bench: Bench) -> None:
    request = make_request("a", [5])
    request = msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, grammar=AB))
    bench.grammars.begin(request, wait=True)
    assert bench.noted == ["a", None]
    assert bench.grammars.take_prepared() == [Prepared("a", None)]


def test_what_waits_to_be_prepared_and_is_forgotten_is_not(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)  # the first one holds the thread until somebody writes it
    bench = Bench(tmp_path)
    for request_id in ("first", "gone", "last"):
        bench.begin(request_id)
    with path.open("w", encoding="utf-8") as held:  # opens when the thread reads
        bench.grammars.forget(["gone"])
        path.unlink()
        byte_level()._library.save(str(path))
        held.write(path.read_text(encoding="utf-8"))
    found: list[Prepared] = []
    while len(found) < 2:
        found += bench.prepared()
    assert found == [Prepared("first", None), Prepared("last", None)]
    assert bench.noted == ["first", None, "last", None]


class Broken:
    """A matcher whose library fails in its own way."""

    def __init__(self, real: object) -> None:
        self._real = real

    def __getattr__(self, name: str) -> object:
        if name in ("consume_token", "unsafe_compute_mask_ptr"):
            raise Panic(name)
        return getattr(self._real, name)


class Panic(BaseException):
    """As a panic of the library comes: no Exception."""


@pytest.mark.parametrize("where", ["mask", "token"])
def test_a_matcher_that_panics_ends_its_row_and_no_other(bench: Bench, where: str) -> None:
    bad, good, grammars = bench.ready("bad"), bench.ready("good"), bench.grammars
    state = grammars._sequences["bad"].state
    assert state is not None
    step = plan(entry(0, bad), entry(1, good))
    if where == "mask":
        state.mask, state.matcher = None, Broken(state.matcher)  # type: ignore[assignment]
    masks = grammars.masks(step)
    assert masks is not None and 1 in masks
    state.matcher = Broken(state.matcher)  # type: ignore[assignment]
    one, other = grammars.accept(step, result(RowResult(0, (A,)), RowResult(1, (A,)))).rows
    assert one.token_ids == () and "Panic" in str(one.error)
    assert other == RowResult(1, (A,))


def hold_reader(path: Path) -> int:
    """A descriptor that keeps whoever reads this FIFO waiting; returns once somebody does."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.005)
    raise AssertionError("nobody reads the vocabulary")


def test_a_preparation_without_end_ends_its_sequence_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    bench = Bench(tmp_path, preparation_seconds=0.2)
    bench.begin("a")
    bench.begin("queued")
    held = hold_reader(path)
    try:
        path.unlink()
        byte_level()._library.save(str(path))
        while not (ended := bench.grammars.take_prepared()):
            time.sleep(0.005)
        assert [each.request_id for each in ended] == ["a"] and "0.2 s" in str(ended[0].error)
        assert bench.grammars.is_preparing and bench.prepared() == [Prepared("queued", None)]
        bench.ready("b")
    finally:
        os.close(held)  # let the thread go
    assert bench._woken.acquire(timeout=30), "the thread tells, and nobody minds"
    assert bench.grammars.take_prepared() == [] and not bench.grammars.is_preparing


def test_a_preparation_without_end_that_nobody_waits_for_any_more_hinders_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    bench = Bench(tmp_path, preparation_seconds=0.2)
    bench.begin("gone")
    bench.begin("queued")
    held = hold_reader(path)
    try:
        path.unlink()
        byte_level()._library.save(str(path))
        bench.grammars.forget(["gone"])
        found: list[Prepared] = []
        while not found:
            found = bench.grammars.take_prepared()
            time.sleep(0.005)
        assert found == [Prepared("queued", None)]
    finally:
        os.close(held)
