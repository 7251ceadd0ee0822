"""`FinishRules`: which token ends a sequence, and with which reason."""

import pytest

from app.core.types import FinishReason
from app.scheduler.finish import Finish, FinishRules
from tests.fakes import make_request

PROMPT = [0, 9, 5]  # end-of-text and stop ids in a prompt end nothing
STOP = Finish(FinishReason.STOP)
LENGTH = Finish(FinishReason.LENGTH)


def end_of(
    output: list[int],
    *,
    max_tokens: int = 100,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: tuple[int, ...] = (9,),
    max_sequence_len: int = 1000,
) -> tuple[int, Finish | None]:
    """How many output tokens are taken until the end, and the end."""
    request = make_request(
        "r", PROMPT, max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids
    )
    rules = FinishRules(request, eos_token_ids=(0, 1), max_sequence_len=max_sequence_len)
    for count in range(1, len(output) + 1):
        if finish := rules.check([*PROMPT, *output[:count]]):
            return count, finish
    return len(output), None


@pytest.mark.parametrize("eos", [0, 1])
def test_any_end_of_text_id_stops(eos: int) -> None:
    assert end_of([5, eos, 5]) == (2, STOP)


def test_a_stop_id_stops_and_is_named() -> None:
    assert end_of([5, 9, 5]) == (2, Finish(FinishReason.STOP, 9))


def test_an_id_that_is_both_counts_as_end_of_text() -> None:
    assert end_of([0], stop_token_ids=(0,)) == (1, STOP)


def test_ignore_eos_ignores_it_but_not_a_stop_id() -> None:
    assert end_of([0, 1, 5, 9], ignore_eos=True) == (4, Finish(FinishReason.STOP, 9))
    assert end_of([5, 0], ignore_eos=True, stop_token_ids=(0,)) == (2, Finish(FinishReason.STOP, 0))


def test_no_ending_id_counts_among_the_first_min_tokens() -> None:
    assert end_of([0, 9, 5, 0], min_tokens=2) == (4, STOP)
    assert end_of([0, 9, 0], min_tokens=2) == (3, STOP)


def test_length_ends_at_max_tokens_or_at_the_context_whichever_is_smaller() -> None:
    assert end_of([5] * 9, max_tokens=4) == (4, LENGTH)
    assert end_of([5] * 9, max_tokens=4, max_sequence_len=5) == (2, LENGTH)
    assert end_of([5] * 9) == (9, None)


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    assert end_of([5, 0], max_tokens=2) == (2, STOP)
