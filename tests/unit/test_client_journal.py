"""The journal: what is handed over, what the consumer sees of several engines, merging, endings."""

import pytest

from app.client.journal import Journal, LiveSequence
from app.core.errors import EngineFailed
from app.core.types import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs


def make(*, num_prompt_logprobs: int | None = None, output_token_ids: tuple[int, ...] = ()) -> LiveSequence:
    params = SamplingParams(seed=7, max_tokens=9, num_prompt_logprobs=num_prompt_logprobs)
    return LiveSequence(
        EngineRequest(
            request_id="a", prompt_token_ids=(1, 2, 3), params=params, output_token_ids=output_token_ids, cache_salt="s"
        )
    )


def logprob(value: float) -> TokenLogprobs:
    return TokenLogprobs(value, 1, (), ())


def test_a_hand_over_goes_on_after_the_last_token_received() -> None:
    sequence = make()
    sequence.receive(EngineOutput("a", (5,)))
    sequence.receive(EngineOutput("a", (6, 7)))
    request = sequence.hand_over()
    assert request.output_token_ids == (5, 6, 7)
    assert (request.prompt_token_ids, request.params, request.cache_salt) == ((1, 2, 3), make().request.params, "s")


def test_tokens_of_the_request_itself_are_kept() -> None:
    sequence = make(output_token_ids=(4,))
    sequence.receive(EngineOutput("a", (5,)))
    assert sequence.hand_over().output_token_ids == (4, 5)


def test_a_request_without_a_token_is_handed_over_as_it_was() -> None:
    sequence = make()
    assert sequence.hand_over() == sequence.request


async def test_prompt_logprobs_are_seen_once() -> None:
    sequence = make(num_prompt_logprobs=0)
    sequence.receive(EngineOutput("a", prompt_logprobs=(logprob(-1),)))
    assert sequence.hand_over().params.num_prompt_logprobs == 0
    sequence.receive(EngineOutput("a", (5,), prompt_logprobs=(logprob(-1), logprob(-2))))
    output = await sequence.next_output()
    assert [entry.logprob for entry in output.prompt_logprobs] == [-1, -2]
    assert sequence.hand_over().params.num_prompt_logprobs is None


async def test_cached_tokens_are_those_of_the_first_engine() -> None:
    sequence = make()
    sequence.receive(EngineOutput("a", (5,), num_cached_tokens=2))
    sequence.hand_over()
    sequence.receive(EngineOutput("a", (6,), num_cached_tokens=0))
    assert (await sequence.next_output()).num_cached_tokens == 2


@pytest.mark.parametrize(("was_sent", "num_cached_tokens"), [(True, 0), (False, 128)])
async def test_what_the_last_engine_computed_for_it_is_not_cached(was_sent: bool, num_cached_tokens: int) -> None:
    """A hand-over before the first output may find its own blocks; one that no engine has had finds others' alone."""
    sequence = make()
    sequence.was_sent = was_sent
    sequence.hand_over()
    sequence.receive(EngineOutput("a", (5,), num_cached_tokens=128))
    assert (await sequence.next_output()).num_cached_tokens == num_cached_tokens


async def test_outputs_that_gathered_come_as_one() -> None:
    sequence = make()
    for token_id in range(5):
        sequence.receive(EngineOutput("a", (token_id,), (logprob(-token_id),)))
    sequence.receive(EngineOutput("a", (5,), (logprob(-5),), finish_reason=FinishReason.STOP, stop_token_id=5))
    output = await sequence.next_output()
    assert output.token_ids == (0, 1, 2, 3, 4, 5)
    assert [entry.logprob for entry in output.logprobs] == [0, -1, -2, -3, -4, -5]
    assert (output.finish_reason, output.stop_token_id) == (FinishReason.STOP, 5)


async def test_a_failure_comes_after_what_was_received_and_nothing_after_the_end() -> None:
    sequence = make()
    sequence.receive(EngineOutput("a", (5,)))
    sequence.fail("broken")
    sequence.receive(EngineOutput("a", (6,)))
    assert (await sequence.next_output()).token_ids == (5,)
    with pytest.raises(EngineFailed, match="broken"):
        await sequence.next_output()


def test_a_finished_sequence_leaves_the_journal_and_unknown_outputs_are_dropped() -> None:
    journal = Journal()
    request = make().request
    sequence = journal.admit(request)
    with pytest.raises(ValueError, match="in use"):
        journal.admit(request)
    assert journal.receive(EngineOutput("unknown", (1,))) is None
    assert journal.receive(EngineOutput("a", (1,))) is sequence
    journal.receive(EngineOutput("a", finish_reason=FinishReason.LENGTH))
    assert len(journal) == 0
    assert not journal.remove(sequence)
    again = journal.admit(request)
    assert not journal.remove(sequence)
    assert journal.remove(again)
    assert again.is_finished


async def test_the_time_in_the_queue_survives_merging() -> None:
    sequence = make()
    sequence.receive(EngineOutput("a", (5,), queue_seconds=0.25))
    sequence.receive(EngineOutput("a", (6,)))
    assert (await sequence.next_output()).queue_seconds == 0.25
