"""Stop strings against a search over the whole text."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.text import StopMatcher

ALPHABET = "ab你😀"
TEXT = st.text(ALPHABET, max_size=40)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=16).map(tuple)


def _reference(text: str, stops: tuple[str, ...], *, include_stop: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(complete, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


def _stream(matcher: StopMatcher, text: str, cuts: list[int]) -> tuple[str, str | None]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    released, matched = "", None
    for start, end in itertools.pairwise(edges):
        step = matcher.push(text[start:end])
        released += step.text
        matched = step.matched
    return released + matcher.finish(), matched


@settings(max_examples=600)
@given(TEXT, STOPS, st.lists(st.integers(0, 40), max_size=10), st.booleans())
@example("abcd" * 3, ("bc", "abcd"), [1, 2, 3], False)
@example("aab", ("ab", "aab", "b"), [1, 2], False)
@example("aaaab", ("aaab",), [1, 2, 3, 4], True)
def test_equal_to_the_reference(text: str, stops: tuple[str, ...], cuts: list[int], include_stop: bool) -> None:
    expected = _reference(text, stops, include_stop=include_stop)
    assert _stream(StopMatcher(stops, include_stop), text, cuts) == expected
    assert _stream(StopMatcher(stops, include_stop), text, list(range(len(text)))) == expected


@settings(max_examples=400)
@given(TEXT, STOPS)
def test_only_what_could_become_a_stop_string_waits(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    released = ""
    for end, char in enumerate(text, start=1):
        step = matcher.push(char)
        if step.matched is not None:
            break
        released += step.text
        prefixes = {stop[:size] for stop in stops for size in range(1, len(stop))}
        held = max((len(prefix) for prefix in prefixes if text[:end].endswith(prefix)), default=0)
        assert len(released) == end - held


@settings(max_examples=400)
@given(TEXT, STOPS, st.integers(0, 20), st.lists(st.integers(0, 40), max_size=10), st.booleans())
@example("aaaa", ("aa",), 3, [], False)
@example("abab", ("aba",), 3, [1, 2], False)
@example("abXY", ("bX",), 2, [], False)
def test_what_ends_in_the_passed_part_is_no_end_and_what_reaches_out_of_it_is_one(
    text: str, stops: tuple[str, ...], passed: int, cuts: list[int], include_stop: bool
) -> None:
    passed = min(passed, len(text))
    matcher = StopMatcher(stops, include_stop)
    released = "".join(matcher.pass_over(char) for char in text[:passed])
    other = StopMatcher(stops, include_stop)
    assert other.pass_over(text[:passed]) == released
    matched = None
    for char in text[passed:]:
        step = matcher.push(char)
        released, matched = released + step.text, step.matched
    ends = [end for end in range(passed + 1, len(text) + 1) if text[:end].endswith(stops)] if stops else []
    if not ends:
        assert (released + matcher.finish(), matched) == (text, None)
        return
    longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert matched == longest
    assert released == text[: ends[0] if include_stop else ends[0] - len(longest)]
