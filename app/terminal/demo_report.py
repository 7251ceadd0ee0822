"""The demo's words: rounds as lines, and whether their texts are the same. Readable without colour."""

from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from app.terminal.demo_round import Round
from app.terminal.show import printable

SHOWN_DIGITS = 16
SHOWN_CHARACTERS = 24
_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")


class Difference(NamedTuple):
    """A text of a later round that is not the one of the first."""

    round_name: str
    prompt_number: int
    """From 1."""
    position: int
    """The first character that differs, from 0."""
    expected: str
    got: str
    """Both from that position on, shortened."""


class Verdict(NamedTuple):
    """What the rounds say together."""

    differences: tuple[Difference, ...]
    errors: tuple[str, ...]
    """One for each stream that did not finish."""
    is_promised: bool
    """Whether the server says that rows are independent."""

    @property
    def exit_code(self) -> int:
        """0 where all finished and texts are equal, or need not be."""
        return int(bool(self.errors) or (self.is_promised and bool(self.differences)))


def judge(rounds: tuple[Round, ...], *, is_promised: bool) -> Verdict:
    """Compare each round with the first."""
    differences = tuple(
        _difference(later.name, number, expected=one.text, got=other.text)
        for later in rounds[1:]
        for number, (one, other) in enumerate(zip(rounds[0].outcomes, later.outcomes, strict=True), start=1)
        if one.text != other.text
    )
    errors = tuple(
        f"{each.name}, prompt {number}: {outcome.error}"
        for each in rounds
        for number, outcome in enumerate(each.outcomes, start=1)
        if outcome.error is not None
    )
    return Verdict(differences, errors, is_promised)


def show_head(console: Console, lines: tuple[str, ...]) -> None:
    """What is about to happen, and the titles of the rounds' columns."""
    for number, line in enumerate(lines):
        console.print(Text(printable(line), style="bold" if number == 0 else ""))
    console.print()
    console.print(Text(_columns("round", "finished", "sha256 of texts", "seconds", "longest pause"), style="dim"))


def show_round(console: Console, done: Round) -> None:
    """One line for the round, and one for each kill in it."""
    finished = f"{done.num_finished}/{len(done.outcomes)}"
    figures = (f"{done.seconds:.1f}", f"{done.longest_pause:.2f} s")
    line = Text(_columns(done.name, finished, done.digest[:SHOWN_DIGITS], *figures))
    if done.num_finished < len(done.outcomes):
        line.stylize("red")
    line.highlight_words([done.digest[:SHOWN_DIGITS]], style="cyan")
    console.print(line)
    for kill in done.kills:
        then = "the streams ended" if kill.pause is None else f"all streams moved again after {kill.pause:.2f} s"
        text = f"   kill -9 {kill.pid} after {kill.num_characters:,} characters: {then}"
        console.print(Text(text, style="yellow"))


def show_verdict(console: Console, rounds: tuple[Round, ...], verdict: Verdict, *, notes: tuple[str, ...]) -> None:
    """The last lines: equal, or what differs."""
    console.print()
    for error in verdict.errors:
        console.print(Text(f"not finished: {printable(error)}", style="red"), soft_wrap=True)
    for found in verdict.differences:
        console.print(Text(_difference_line(found), style="red" if verdict.is_promised else ""), soft_wrap=True)
    style = "bold red" if verdict.exit_code else "bold green"
    console.print(Text(_verdict_line(rounds, verdict), style=style), soft_wrap=True)
    for note in notes:
        console.print(Text(printable(note)), soft_wrap=True)


def show_sample(console: Console, prompt: str, text: str) -> None:
    """One prompt and how every round went on from it, on one line."""
    begin, end = (printable(part.replace("\n", "⏎")) for part in (prompt, text))
    console.print(Text.assemble((begin, "dim"), end), no_wrap=True, overflow="ellipsis")


def _difference(round_name: str, number: int, *, expected: str, got: str) -> Difference:
    pairs = zip(expected, got, strict=False)
    shorter = min(len(expected), len(got))
    position = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
    end = position + SHOWN_CHARACTERS
    return Difference(round_name, number, position, expected[position:end], got[position:end])


def _difference_line(found: Difference) -> str:
    return (
        f"prompt {found.prompt_number}, {found.round_name}: differs at character {found.position}: "
        f"{found.got!r} in place of {found.expected!r}"
    )


def _verdict_line(rounds: tuple[Round, ...], verdict: Verdict) -> str:
    count = _NUMBER_WORDS[len(rounds)]
    digests = {each.digest for each in rounds}
    if verdict.errors:
        return f"Not every answer finished: {len(verdict.errors)} did not."
    if len(digests) == 1:
        return f"{count.capitalize()} equal hashes:\n{rounds[0].digest}"
    numbers = sorted({found.prompt_number for found in verdict.differences})
    which = f"prompts that differ: {', '.join(map(str, numbers))} of {len(rounds[0].outcomes)}"
    return f"The hashes differ; {which}." if verdict.is_promised else f"The hashes differ, as they may; {which}."


def _columns(name: str, finished: str, digest: str, seconds: str, pause: str) -> str:
    return f"{name:<24}{finished:>8}   {digest:<19}{seconds:>8}{pause:>15}"
