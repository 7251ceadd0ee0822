"""What is kept of streams, and until when."""

import asyncio
from dataclasses import dataclass

from app.api.kept import ChoiceRecord, KeptStreams, StreamKey, StreamRecord
from app.core.types import EngineOutput, FinishReason, TokenLogprobs

ENTRY = TokenLogprobs(-1.0, 1, (1, 2), (-1.0, -2.0))


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def record_of(number: int, *, num_tokens: int = 3) -> StreamRecord:
    choice = ChoiceRecord()
    choice.add(EngineOutput("r", tuple(range(num_tokens))))
    return StreamRecord(StreamKey("owner", f"id-{number}", 1, number, b"p", b"q"), (choice,))


async def test_a_stream_is_found_while_it_runs_and_for_a_window_after() -> None:
    clock = Clock()
    kept = KeptStreams(window=60, clock=clock)
    record = record_of(1)
    kept.open(record)
    clock.now += 1000
    assert kept.find(record.key) is record
    kept.close(record)
    clock.now += 59
    assert kept.find(record.key) is record and kept.num_bytes > 0
    clock.now += 1
    assert kept.find(record.key) is None
    assert (len(kept), kept.num_bytes) == (0, 0)


async def test_another_owner_finds_nothing() -> None:
    kept = KeptStreams()
    record = record_of(1)
    kept.open(record)
    kept.close(record)
    assert kept.find(record.key._replace(owner="other")) is None


async def test_the_oldest_goes_where_there_are_too_many_or_too_much() -> None:
    few = KeptStreams(max_streams=2)
    small = KeptStreams(max_bytes=2 * record_of(0, num_tokens=100).choices[0].num_bytes)
    for kept, num_tokens in ((few, 1), (small, 100)):
        records = [record_of(number, num_tokens=num_tokens) for number in range(4)]
        for record in records:
            kept.open(record)
        for record in records:
            kept.close(record)
        assert [kept.find(record.key) is not None for record in records] == [False, False, True, True]


async def test_a_stream_that_goes_on_takes_the_place_of_the_one_before() -> None:
    kept = KeptStreams()
    before, after = record_of(1), record_of(1)
    kept.open(before)
    kept.open(after)
    kept.close(before)  # its end is nobody's business any more
    assert kept.find(after.key) is after
    kept.close(after)
    kept.open(again := record_of(1))
    assert kept.num_bytes == 0
    kept.drop(again)
    assert len(kept) == 0


async def test_it_is_dropped_in_time_where_nobody_asks() -> None:
    kept = KeptStreams(window=0.01)
    record = record_of(1)
    kept.open(record)
    kept.close(record)
    async with asyncio.timeout(10):
        while len(kept):  # noqa: ASYNC110  # it has no event: nobody waits for it
            await asyncio.sleep(0.001)


def brought(num_tokens: int, *, num_candidates: int = 0) -> EngineOutput:
    candidates = tuple(range(num_candidates))
    entry = TokenLogprobs(-1.0, 1, candidates, tuple(float(one) for one in candidates))
    return EngineOutput("r", tuple(range(num_tokens)), (entry,) * num_tokens if num_candidates else ())


async def test_what_runs_has_no_more_bytes_than_one_stream_may_and_gives_what_is_newest() -> None:
    kept = KeptStreams(max_stream_bytes=100_000)
    record = record_of(1, num_tokens=0)
    choice = record.choices[0]
    kept.open(record)
    for count in range(1, 1001):
        kept.add(record, 0, brought(1, num_candidates=20))
        assert record.num_bytes == kept.num_running_bytes <= 100_000
        assert len(choice.token_ids) == count == choice.first_known + len(choice.logprobs)
    assert 0 < choice.first_known < 1000
    assert not choice.knows(choice.first_known - 1) and choice.knows(choice.first_known) and choice.knows(1000)
    newest = choice.since(990, "r")
    assert newest is not None and len(newest.token_ids) == len(newest.logprobs) == 10
    kept.close(record)
    assert kept.find(record.key) is record and (kept.num_bytes, kept.num_running_bytes) == (record.num_bytes, 0)


async def test_a_stream_whose_tokens_alone_are_too_much_is_not_kept() -> None:
    kept = KeptStreams(max_stream_bytes=1000)
    record = record_of(1)
    kept.open(record)
    for _ in range(100):
        kept.add(record, 0, brought(1))
    assert kept.find(record.key) is None and (record.num_bytes, kept.num_running_bytes) == (0, 0)
    kept.close(record)
    assert (len(kept), kept.num_bytes) == (0, 0)


async def test_where_all_that_runs_is_too_much_the_largest_is_not_kept() -> None:
    kept = KeptStreams(max_running_bytes=record_of(0, num_tokens=100).num_bytes)
    records = [record_of(number, num_tokens=num_tokens) for number, num_tokens in enumerate((20, 60, 19))]
    for record in records:
        kept.open(record)
    kept.add(records[2], 0, brought(1))
    assert all(kept.find(record.key) is record for record in records)
    kept.add(records[2], 0, brought(1))
    assert [kept.find(record.key) is record for record in records] == [True, False, True]
    assert kept.num_running_bytes == records[0].num_bytes + records[2].num_bytes
    kept.add(records[1], 0, brought(5))
    assert records[1].num_bytes == 0


async def test_a_stream_that_lost_its_place_gathers_nothing() -> None:
    kept = KeptStreams()
    before, after = record_of(1), record_of(1)
    kept.open(before)
    kept.open(after)
    kept.add(before, 0, brought(5))
    assert before.num_bytes == 0 and kept.num_running_bytes == after.num_bytes > 0


def test_a_record_gives_what_comes_after_a_position_as_one_output() -> None:
    record = ChoiceRecord((7, 8))
    assert record.since(2, "r") is None
    record.add(EngineOutput("e", (9,), (ENTRY,)))
    record.add(EngineOutput("e", (10,), (ENTRY,), finish_reason=FinishReason.STOP, stop_token_id=10))
    assert [record.knows(position) for position in range(6)] == [False, False, True, True, True, False]
    copied = record.copy()
    for one in (record, copied):
        assert one.since(3, "r") == EngineOutput(
            "r", (10,), (ENTRY,), finish_reason=FinishReason.STOP, stop_token_id=10
        )
        assert one.since(4, "r") == EngineOutput("r", finish_reason=FinishReason.STOP, stop_token_id=10)
    copied.add(EngineOutput("e", (11,)))
    assert record.token_ids == [7, 8, 9, 10]


def test_an_abort_is_no_end() -> None:
    record = ChoiceRecord()
    record.add(EngineOutput("e", (1,), finish_reason=FinishReason.ABORT))
    assert record.finish is None
