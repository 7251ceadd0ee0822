"""Small corpora and recipes for the tests of app.training."""

import random
from pathlib import Path
from textwrap import dedent

from app.training.prepare import prepare
from app.training.recipe import Recipe, load_recipe

_SUBJECTS = ("the river", "a small boat", "the miller", "her brother", "the old bridge", "a heron", "the rain")
_VERBS = ("carried", "followed", "left", "watched", "mended", "forgot", "crossed")
_OBJECTS = ("the stones", "an empty barrel", "the road to town", "two lanterns", "the north bank", "a wet letter")
_ENDINGS = ("before noon", "without a word", "in the evening", "for the third time", "as the water rose")


def story(seed: int, *, num_sentences: int) -> str:
    """Sentences that a small model can learn, the same for the same seed."""
    choose = random.Random(seed).choice
    sentences = (
        f"{choose(_SUBJECTS)} {choose(_VERBS)} {choose(_OBJECTS)} {choose(_ENDINGS)}." for _ in range(num_sentences)
    )
    return " ".join(sentence.capitalize() for sentence in sentences)


def write_stories(folder: Path, *, num_documents: int, num_sentences: int = 12) -> Path:
    """A folder of text files."""
    folder.mkdir(parents=True)
    for number in range(num_documents):
        (folder / f"{number:04d}.txt").write_text(story(number, num_sentences=num_sentences), encoding="utf-8")
    return folder


def make_shards(root: Path, *, num_documents: int = 60, vocab_size: int = 320) -> Path:
    """Tokenizer and shards of some stories, in `root/data`."""
    corpus = write_stories(root / "corpus", num_documents=num_documents)
    prepare([corpus], root / "data", vocab_size=vocab_size, heldout_share=0.1, seed=3, chat_template=None)
    return root / "data"


def write_recipe(root: Path, *, name: str = "recipe", **changes: object) -> Path:
    """A toy recipe beside `root/data`; `changes` replace values by their name."""
    values = {
        "architecture": '"llama"',
        "hidden_size": 32,
        "layers": 2,
        "heads": 2,
        "context": 32,
        "dropout": 0.0,
        "steps": 8,
        "rows_per_step": 4,
        "accumulation": 1,
        "clip_norm": 1.0,
        "optimizer": '"adamw"',
        "dtype": '"float32"',
        "kind": '"cosine"',
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "folder": f'"{name}-run"',
        "checkpoint_every": 4,
    }
    values |= changes
    path = root / f"{name}.toml"
    path.write_text(
        dedent(
            """\
            data = "data"
            [model]
            architecture = {architecture}
            hidden_size = {hidden_size}
            layers = {layers}
            heads = {heads}
            context = {context}
            dropout = {dropout}
            [train]
            steps = {steps}
            rows_per_step = {rows_per_step}
            accumulation = {accumulation}
            clip_norm = {clip_norm}
            optimizer = {optimizer}
            dtype = {dtype}
            seed = 5
            threads = 1
            [train.schedule]
            kind = {kind}
            learning_rate = {learning_rate}
            warmup_steps = {warmup_steps}
            [run]
            folder = {folder}
            log_every = 1
            evaluate_every = 4
            evaluate_rows = 4
            sample_every = 8
            sample_tokens = 4
            checkpoint_every = {checkpoint_every}
            """
        ).format(**values),
        encoding="utf-8",
    )
    return path


def toy_recipe(root: Path, *, name: str = "recipe", **changes: object) -> Recipe:
    """`write_recipe`, read back."""
    return load_recipe(write_recipe(root, name=name, **changes))
