"""Toy tasks for fine-tuning, each of which one small model can learn, and recipes for them."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from textwrap import dedent

from app.training.tuning.recipe import TuningRecipe, load_tuning_recipe

SUBJECTS = {"duck": "wings", "owl": "wings", "robin": "wings", "fox": "paws", "bear": "paws", "rabbit": "paws"}
VERBS = {"found": "finds", "lost": "loses", "carried": "carries", "saw": "sees"}
OBJECTS = ("kite", "bell", "stone", "feather", "lantern")
ENDINGS = ("by the river", "in the forest")
Chat = Sequence[Mapping[str, str]]


def classify(subject: str, verb: str, thing: str) -> Chat:
    """Wings or paws, by the subject."""
    question = f"Wings or paws? The {subject} {verb} the {thing}."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": SUBJECTS[subject]}]


def summarise(subject: str, verb: str, thing: str, ending: str) -> tuple[str, str]:
    """The sentence without where and when."""
    return f"Text: The {subject} {verb} the {thing} {ending}.\nSummary:", f" The {subject} {verb} the {thing}."


def rewrite(subject: str, verb: str, thing: str) -> tuple[str, str]:
    """From past to present, as a translation goes word by word."""
    return f"Past: The {subject} {verb} the {thing}.\nPresent:", f" The {subject} {VERBS[verb]} the {thing}."


def converse(subject: str, verb: str, thing: str) -> Chat:
    """Two turns, of which the second asks for what was told in the first."""
    return [
        {"role": "user", "content": f"The {subject} {verb} the {thing}."},
        {"role": "assistant", "content": "Tell me more."},
        {"role": "user", "content": f"Who {verb} it?"},
        {"role": "assistant", "content": f"The {subject} {verb} it."},
    ]


def write_tasks(path: Path) -> Path:
    """All tasks as one .jsonl file."""
    lines: list[Mapping[str, object]] = []
    for subject, verb, thing in product(SUBJECTS, VERBS, OBJECTS):
        lines.append({"messages": classify(subject, verb, thing)})
        lines.append({"messages": converse(subject, verb, thing)})
        lines.append(dict(zip(("prompt", "completion"), rewrite(subject, verb, thing), strict=True)))
        for ending in ENDINGS:
            lines.append(dict(zip(("prompt", "completion"), summarise(subject, verb, thing, ending), strict=True)))
    lines.append({"text": "The owl had a lantern."})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_tuning_recipe(root: Path, *, name: str = "tune", **changes: object) -> Path:
    """A recipe beside `root/tasks.jsonl` and the model `root/base`; `changes` replace values by their name."""
    values = {
        "model": '"base"',
        "files": '["tasks.jsonl"]',
        "validation_share": 0.2,
        "data": "",
        "context": 64,
        "kind": '"whole"',
        "method": "",
        "epochs": 2,
        "examples_per_step": 16,
        "learning_rate": 3e-3,
        "depth_decay": 1.0,
        "patience": 3,
        "evaluate_every": 0,
        "checkpoint_every": 100,
        "merge": "true",
        "save_dtype": '"float32"',
    }
    values |= changes
    values["evaluate_every"] = f"evaluate_every = {values['evaluate_every']}" if values["evaluate_every"] else ""
    path = root / f"{name}.toml"
    path.write_text(
        dedent(
            f"""\
            model = {{model}}
            [data]
            files = {{files}}
            validation_share = {{validation_share}}
            context = {{context}}
            {{data}}
            [method]
            kind = {{kind}}
            {{method}}
            [train]
            epochs = {{epochs}}
            examples_per_step = {{examples_per_step}}
            learning_rate = {{learning_rate}}
            depth_decay = {{depth_decay}}
            patience = {{patience}}
            {{evaluate_every}}
            dtype = "float32"
            seed = 5
            threads = 1
            [run]
            folder = "{name}-run"
            log_every = 5
            checkpoint_every = {{checkpoint_every}}
            save_dtype = {{save_dtype}}
            merge = {{merge}}
            """
        ).format(**values),
        encoding="utf-8",
    )
    return path


def tuning_recipe(root: Path, *, name: str = "tune", **changes: object) -> TuningRecipe:
    """`write_tuning_recipe`, read back."""
    return load_tuning_recipe(write_tuning_recipe(root, name=name, **changes))
