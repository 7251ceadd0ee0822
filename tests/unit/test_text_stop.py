"""app.text.stop: cases worth reading; the property tests hold the rest."""

import pytest

from app.text import StopMatcher, StopStep


def test_without_stop_strings_text_passes() -> None:
    matcher = StopMatcher(())
    assert (matcher.push("any"), matcher.finish()) == (StopStep("any", None), "")


def test_the_earliest_completing_stop_string_wins() -> None:
    assert StopMatcher(("abcd", "bc")).push("xabcd") == StopStep("xa", "bc")


def test_of_those_that_end_together_the_longest_wins() -> None:
    for stops in (("c", "abc", "bc"), ("abc", "bc", "c")):
        assert StopMatcher(stops).push("xabcd") == StopStep("x", "abc")


def test_a_stop_string_is_never_leaked_across_pushes() -> None:
    matcher = StopMatcher(("\n\n用户：",))
    assert [matcher.push(char).text for char in "答\n\n用户：x"] == ["答", "", "", "", "", "", ""]
    assert matcher.push("more") == StopStep("", "\n\n用户：")
    assert matcher.finish() == ""


def test_held_text_is_released_when_it_cannot_match_or_at_the_end() -> None:
    matcher = StopMatcher(("END",))
    assert [matcher.push(text).text for text in ("E", "N", "x", "EN")] == ["", "", "ENx", ""]
    assert matcher.finish() == "EN"


def test_the_stop_string_is_included_when_asked_for() -> None:
    matcher = StopMatcher(("END",), include_stop=True)
    assert matcher.push("go E") == StopStep("go ", None)
    assert matcher.push("ND now") == StopStep("END", "END")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("a", ""))


def test_long_periodic_stop_strings_stay_linear() -> None:
    """Naive search would take hours: 16 stop strings of 100,000 characters that nearly match everywhere."""
    stops = tuple("a" * 100_000 + chr(ord("b") + index) for index in range(16))
    matcher = StopMatcher(stops)
    released = sum(len(matcher.push("a" * 50).text) for _ in range(400))
    assert (released, len(matcher.finish())) == (0, 20_000)
