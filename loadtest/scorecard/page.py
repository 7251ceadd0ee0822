"""docs/scorecard.md, written from what was found; nobody edits it by hand."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.scorecard.finding import Finding, Verdict

RESULTS = Path("loadtest/results/scorecard")
PAGE = Path("docs/scorecard.md")

_ASKED = {
    "fields": "Is a field that would change the answer honoured, refused or reported, never silently dropped?",
    "nonsense": "Do requests that mean nothing get a 4xx?",
    "stop strings": "Does the text end exactly before the stop string, whole and streamed?",
    "characters": "Does no event hold a piece of a character (Chinese, emoji)?",
    "stream = answer": "Is the joined stream the text that comes without streaming?",
    "seeds": "Does a seed give its text again?",
    "rows": "Is the text the same alone and among 15 others (sampled, with seeds)?",
    "usage": "Are the token counts right, streamed too?",
    "aborts": "After 16 clients hang up, does nothing run on?",
    "overload": "1,500 requests at once: is each answered, or refused with Retry-After?",
    "hang": "The process with the model is stopped (SIGSTOP): is that noticed?",
    "kill -9": "The process with the model is killed under 16 streams: do they go on?",
}
_MARK = {Verdict.PASS: "**yes**", Verdict.PARTLY: "partly", Verdict.FAIL: "no", Verdict.NOT_RUN: "not run"}
_OTHERS = """
## Where others win

These checks are about what Headwater is for. It is not the server for everything:

- **GPUs.** vLLM, SGLang and TGI are made for them, llama.cpp runs on CUDA, Metal and Vulkan. Headwater's tier for CUDA
  is written and not measured.
- **Models.** vLLM and llama.cpp serve some hundreds of architectures, vision and speech among them, and transformers
  serves what it can load. Headwater serves decoders of text: those of transformers, and
  [some families](reference/families.md) with kernels of its own.
- **Sizes.** llama.cpp has quantisations down to under 2 bits, and offloads layers to whatever is there.
- **Many machines.** vLLM and SGLang serve one model from several GPUs and nodes.
- **Speed.** On a CPU: [benchmarks.md](benchmarks.md), with the rows in which another server is ahead.
"""
_HEAD = """# A scorecard for any server

What a server keeps of what it takes, asked through its public API alone. Written by `python -m loadtest scorecard`
from the findings in `loadtest/results/scorecard/`; the checks are in `loadtest/scorecard/`, and any server that speaks
`/v1/completions` can be put through them:

```sh
python -m loadtest scorecard --url http://127.0.0.1:8000 --pid $(pgrep -f "headwater serve")
```

They were written by the people who write Headwater, about what they care for: read them before you read the table.
Each server runs in the settings of [benchmarks.md](benchmarks.md), with the same weights, one server at a time.
"""


class Card(msgspec.Struct, frozen=True):
    """All findings on one server."""

    name: str
    title: str
    precision: str
    version: str
    machine: str
    date: str
    findings: tuple[Finding, ...]

    def verdict(self, check: str) -> Finding:
        """What was found; a check that is new since then was not run."""
        return next((each for each in self.findings if each.check == check), Finding(check, Verdict.NOT_RUN, "new"))


def read_cards(folder: Path) -> list[Card]:
    """Ours first, then by name."""
    cards = [msgspec.json.decode(path.read_bytes(), type=Card) for path in folder.glob("*.json")]
    return sorted(cards, key=lambda card: (not card.name.startswith("headwater"), card.name))


def render(cards: Sequence[Card]) -> str:
    """The page."""
    heads = [f"{card.title} {card.precision}" for card in cards]
    lines = [_HEAD, "| " + " | ".join(["", *heads]) + " |", "|" + "---|" * (len(cards) + 1)]
    for check, question in _ASKED.items():
        cells = [_MARK[card.verdict(check).verdict] for card in cards]
        lines.append("| " + " | ".join([question, *cells]) + " |")
    lines.append("\n## What was counted\n")
    for card in cards:
        lines.append(f"**{card.title} {card.precision}**, version {card.version}, {card.date}, {card.machine}:\n")
        lines += [f"- {each.check}: {each.verdict.value}. {each.detail}." for each in card.findings]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" + _OTHERS
