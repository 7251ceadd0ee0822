"""Owns stop strings of one stream: where text ends, and how much of it must wait.

The first stop string to be *complete* wins; of several that end at the same character the longest. Only
the longest end of the text that could still become a stop string is held back, so nothing of a stop
string is ever released. The answer does not depend on how the text was split.

Each stop string is followed by Knuth, Morris and Pratt's method, its table made only as far as the text
has matched: a push costs a character search per stop string, and long stop strings cost nothing up front.
"""

from typing import NamedTuple


class StopStep(NamedTuple):
    """What a push released, and the stop string that ended the text, if one did."""

    text: str
    matched: str | None


class StopMatcher:
    """Stop strings of one stream; raises ValueError for an empty one, which would match everywhere."""

    def __init__(self, stops: tuple[str, ...], include_stop: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; leave it out")
        self._trackers = tuple(_StopTracker(stop) for stop in dict.fromkeys(stops))
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> StopStep:
        """Take the next text. After a match every further push gives nothing."""
        if self._matched is not None:
            return StopStep("", self._matched)
        if not self._trackers:
            return StopStep(text, None)
        end, longest_open = len(text), 0
        for tracker in self._trackers:
            found = tracker.advance(text, end)
            if found is not None:
                longer = self._matched is None or found < end or len(tracker.stop) > len(self._matched)
                end = found
                self._matched = tracker.stop if longer else self._matched
            elif tracker.num_matched > longest_open:
                longest_open = tracker.num_matched
        return self._release(text, end, longest_open)

    def pass_over(self, text: str) -> str:
        """Take text in which nothing may end; a stop string that begins in it may still end behind it."""
        for tracker in self._trackers:
            tracker.pass_over(text)
        longest_open = max((tracker.num_matched for tracker in self._trackers), default=0)
        return self._release(text, len(text), longest_open).text

    def finish(self) -> str:
        """The text held back, when the stream ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str, end: int, longest_open: int) -> StopStep:
        pending = self._held + text
        if self._matched is not None:
            end += len(self._held)
            self._held = ""
            return StopStep(pending[: end if self._include_stop else end - len(self._matched)], self._matched)
        size = len(pending) - longest_open
        self._held = pending[size:]
        return StopStep(pending[:size], None)


class _StopTracker:
    """How many characters of one stop string the text ends with."""

    __slots__ = ("_borders", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._borders = [0, 0]
        """Index n: length of the longest proper border of stop[:n]; grown when n is first reached."""

    def advance(self, text: str, limit: int) -> int | None:
        """Read text[:limit]; the index after the character that completed the stop string, else None."""
        stop, size, matched, borders = self.stop, len(self.stop), self.num_matched, self._borders
        index = 0
        while index < limit:
            if matched == 0:
                index = text.find(stop[0], index, limit)
                if index < 0:
                    break
            char = text[index]
            while matched and stop[matched] != char:
                matched = borders[matched]
            if stop[matched] == char:
                matched += 1
            index += 1
            if matched == size:
                self.num_matched = matched
                return index
            if matched == len(borders):
                borders.append(self._next_border())
        self.num_matched = matched
        return None

    def pass_over(self, text: str) -> None:
        """Read all of the text; a whole stop string in it is only the beginning of the next one."""
        start = 0
        while (found := self.advance(text[start:], len(text) - start)) is not None:
            start += found
            if self.num_matched == len(self._borders):
                self._borders.append(self._next_border())
            self.num_matched = self._borders[self.num_matched]

    def _next_border(self) -> int:
        stop, borders = self.stop, self._borders
        last = stop[len(borders) - 1]
        border = borders[-1]
        while border and stop[border] != last:
            border = borders[border]
        return border + 1 if stop[border] == last else 0
