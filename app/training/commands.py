"""The commands that make models. Registering them costs nothing: torch is imported when one runs."""

import argparse
from pathlib import Path
from typing import Any

from app.console import answer, remark
from app.core.errors import ConfigurationError

_EXIT_STOPPED = 1


def register(commands: Any) -> None:
    """Add the commands to the parsers of `headwater` (what `add_subparsers` returned)."""
    _add_tokenizer(commands)
    _add_pretrain(commands)


def _add_tokenizer(commands: Any) -> None:
    parser = commands.add_parser("tokenizer", help="make a tokenizer and token shards from text")
    parser.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS", help="text or .jsonl files, or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer and shards")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="most tokens of the vocabulary [4096]"
    )
    parser.add_argument(
        "--heldout", type=float, default=0.05, metavar="SHARE", help="share of the documents held out [0.05]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle and the split [0]")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of ChatML")
    parser.set_defaults(command=_tokenizer)


def _add_pretrain(commands: Any) -> None:
    parser = commands.add_parser("pretrain", help="train a model from a recipe, or go on with it")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a .toml file")
    parser.set_defaults(command=_pretrain)


def _tokenizer(options: argparse.Namespace) -> int:
    from app.training.prepare import prepare

    summary = prepare(
        options.corpus,
        options.out,
        vocab_size=options.vocab_size,
        heldout_share=options.heldout,
        seed=options.seed,
        chat_template=options.chat_template,
    )
    answer(summary)
    answer(f"wrote {options.out}; name it as `data` in a recipe for `headwater pretrain`")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from app.training.errors import TrainingStopped
    from app.training.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    try:
        from app.training.pretrain import pretrain
    except ImportError as error:
        raise ConfigurationError(
            f"training needs torch and transformers ({error}); install them with: pip install 'headwater[torch]'"
        ) from error
    try:
        folder = pretrain(recipe)
    except TrainingStopped as error:
        remark(f"headwater: {error}")
        return _EXIT_STOPPED
    if folder is not None:
        answer(f"the model is in {folder}; serve it with: headwater serve {folder}")
    return 0
