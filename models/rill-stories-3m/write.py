"""Makes the corpus of this model: short stories by the default model, which Headwater serves.

    headwater serve smollm2-135m-instruct-q4 --port 8000 --no-page &
    python write.py drafts.jsonl --count N --url http://127.0.0.1:8000
    python write.py drafts.jsonl --count N --keep stories.jsonl.gz

A story follows from its number: the request is drawn by it, and it is the seed of the sampling. The second line may be
stopped and given again. The third drops stories that are short, repeat themselves, or are no plain prose, and cuts
those that ran out of tokens behind their last whole sentence.
"""

import argparse
import asyncio
import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

ANIMALS = (
    "rabbit", "fox", "bear", "mouse", "owl", "duck", "frog", "squirrel", "hedgehog", "kitten", "puppy", "pony", "lamb",
    "turtle", "otter", "badger", "beaver", "goose", "hen", "penguin", "elephant", "monkey", "lion", "tiger", "deer",
    "mole", "snail", "bee", "butterfly", "crow", "robin", "pig", "cow", "goat", "donkey", "dragon", "whale", "dolphin",
    "crab", "raccoon",
)  # fmt: skip
TRAITS = (
    "shy", "brave", "curious", "lazy", "grumpy", "kind", "tiny", "clumsy", "proud", "sleepy", "lonely", "cheerful",
    "greedy", "clever", "forgetful", "gentle", "noisy", "careful", "silly", "worried",
)  # fmt: skip
THINGS = (
    "a red kite", "a lost key", "a silver bell", "a broken wagon", "a warm scarf", "a strange map", "a shiny stone",
    "a blue umbrella", "a big pumpkin", "an old boat", "a tiny seed", "a golden feather", "a paper star",
    "a wooden flute", "a jar of honey", "a lantern", "a birthday cake", "a torn book", "a round drum",
    "a basket of apples", "a snow globe", "a missing shoe", "a music box", "a yellow balloon", "a glass marble",
    "a bag of nuts", "a garden gate", "a picture of the sea", "a small ladder", "a soft pillow",
)  # fmt: skip
PLACES = (
    "in the forest", "by the river", "on a farm", "in the snow", "by the sea", "in a garden", "on a hill",
    "in a small village", "at the market", "in a cave", "near a lake", "in a meadow", "on an island", "at school",
    "in an old house", "under the big oak tree", "on a rainy day", "on a windy day", "at night", "in spring",
    "in autumn", "in winter",
)  # fmt: skip
LESSONS = (
    "sharing", "telling the truth", "being brave", "helping a friend", "saying sorry", "being patient",
    "trying again", "listening", "making a new friend", "being careful", "working together", "saying thank you",
    "finding the way home", "learning something new", "a surprise", "keeping a promise",
)  # fmt: skip
NUM_PARALLEL = 128
LEAST_CHARACTERS = 250
MOST_REPEATED = 0.05
"""Share of a story's runs of four words that stood in it before."""
NO_PROSE = re.compile(r"[*#\[\]{}<>_]|\d\.|http")
SENTENCE_END = re.compile(r'[.!?]"?(?=\s|$)')


def request(number: int) -> dict[str, Any]:
    """The body that asks for one story."""
    pick = random.Random(number)
    one, other = pick.sample(ANIMALS, 2)
    text = (
        "Write a short story for a small child. Use simple words. It is about a "
        f"{pick.choice(TRAITS)} {one} who finds {pick.choice(THINGS)} {pick.choice(PLACES)}"
    )
    text += pick.choice(["", f" and meets a {pick.choice(TRAITS)} {other}"])
    text += f". It is a story about {pick.choice(LESSONS)}."
    sampling = {"max_tokens": 180, "temperature": 0.6, "top_p": 0.95, "frequency_penalty": 0.3, "seed": number}
    return {"messages": [{"role": "user", "content": text}], **sampling}


async def write(drafts: Path, missing: Sequence[int], *, url: str) -> None:
    """Ask for the stories of these numbers."""
    numbers = iter(missing)
    with drafts.open("a", encoding="utf-8") as file:
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

            async def work() -> None:
                for number in numbers:
                    answer = await client.post(f"{url}/v1/chat/completions", json=request(number))
                    answer.raise_for_status()
                    choice = answer.json()["choices"][0]
                    line = {"number": number, "finish": choice["finish_reason"], "text": choice["message"]["content"]}
                    file.write(json.dumps(line) + "\n")
                    file.flush()

            await asyncio.gather(*(work() for _ in range(NUM_PARALLEL)))


def keep(drafts: Path, target: Path, *, count: int) -> None:
    """Write the stories that are fit to learn from, in the order of their numbers."""
    seen: set[str] = set()
    lines = []
    for line in sorted(read(drafts), key=lambda line: int(line["number"])):
        text = story(line)
        if line["number"] < count and text is not None and text not in seen:
            seen.add(text)
            lines.append(json.dumps({"number": line["number"], "text": text}) + "\n")
    target.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    print(f"{len(lines)} of {count} stories, {sum(map(len, seen)):,} characters")  # noqa: T201


def story(line: dict[str, Any]) -> str | None:
    """The text, in plain quotes and whole sentences; None where it is not fit."""
    text = str(line["text"]).strip().replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    if line["finish"] != "stop":
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    is_prose = text.isascii() and not NO_PROSE.search(text)
    return text if is_prose and len(text) >= LEAST_CHARACTERS and repeated_share(text) <= MOST_REPEATED else None


def repeated_share(text: str, size: int = 4) -> float:
    """The share of runs of words that stood earlier in the same text."""
    words = text.split()
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / max(len(runs), 1)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Its lines."""
    yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Write drafts, or keep the good ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--url")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.keep is not None:
        keep(options.drafts, options.keep, count=options.count)
    else:
        done = {line["number"] for line in read(options.drafts)} if options.drafts.is_file() else set()
        missing = sorted(set(range(options.count)) - done)
        asyncio.run(write(options.drafts, missing, url=options.url))


if __name__ == "__main__":
    main()
