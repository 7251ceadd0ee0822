"""The commands that make models. Registering them costs nothing: torch is imported when one runs."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.console import answer, remark
from app.core.errors import ConfigurationError

_EXIT_STOPPED = 1


def register(commands: Any, *, find_model: Callable[[str], Path]) -> None:
    """Add the commands to the parsers of `headwater` (what `add_subparsers` returned).

    Args:
        find_model: from what `headwater serve` takes as MODEL to the folder of it.
    """
    _add_tokenizer(commands)
    _add_pretrain(commands)
    _add_finetune(commands, find_model)
    _add_merge(commands, find_model)
    _add_evaluate(commands, find_model)


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


def _add_finetune(commands: Any, find_model: Callable[[str], Path]) -> None:
    parser = commands.add_parser("finetune", help="teach a model answers from examples, by a recipe")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a .toml file")
    parser.set_defaults(command=partial(_finetune, find_model))


def _add_merge(commands: Any, find_model: Callable[[str], Path]) -> None:
    parser = commands.add_parser("merge", help="make one model of a model and an adapter")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder that `headwater finetune` wrote")
    parser.add_argument("--model", required=True, metavar="MODEL", help="that the adapter was trained beside")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model")
    parser.set_defaults(command=partial(_merge, find_model))


def _add_evaluate(commands: Any, find_model: Callable[[str], Path]) -> None:
    parser = commands.add_parser("evaluate", help="measure a model, in this process or behind a server")
    parser.add_argument("model", metavar="MODEL", help="what `headwater serve` takes")
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="PLACE", help="text: perplexity of each file"
    )
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="task files of the LM Evaluation Harness")
    parser.add_argument("--limit", type=int, metavar="N", help="most documents of the text, and of each task")
    parser.add_argument("--url", help="of a server of MODEL, with the key of OPENAI_API_KEY; default: in process")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="float32", help="in process [float32]"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="in process; 0 is torch's own choice [0]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.set_defaults(command=partial(_evaluate, find_model))


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
    from app.training.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    with _needs_torch():
        from app.training.pretrain import pretrain
    with _stops() as outcome:
        folder = pretrain(recipe)
        if folder is not None:
            answer(f"the model is in {folder}; serve it with: headwater serve {folder}")
    return outcome.exit_code


def _finetune(find_model: Callable[[str], Path], options: argparse.Namespace) -> int:
    from app.training.tuning.recipe import load_tuning_recipe

    recipe = load_tuning_recipe(options.recipe)
    with _needs_torch():
        from app.training.tuning.finetune import finetune
    with _stops() as outcome:
        done = finetune(recipe, find_model=find_model)
        answer(f"before: {done.before}\nafter:  {done.after}")
        if done.folder.name == "adapter":
            answer(
                f"the adapter is in {done.folder}; merge it with: headwater merge {done.folder} --model MODEL --out DIR"
            )
        else:
            answer(f"the model is in {done.folder}; serve it with: headwater serve {done.folder}")
    return outcome.exit_code


def _merge(find_model: Callable[[str], Path], options: argparse.Namespace) -> int:
    with _needs_torch():
        from app.training.tuning.publish import merge_adapter
    with _stops() as outcome:
        merge_adapter(options.adapter, find_model(options.model), options.out)
        answer(f"the model is in {options.out}; serve it with: headwater serve {options.out}")
    return outcome.exit_code


def _evaluate(find_model: Callable[[str], Path], options: argparse.Namespace) -> int:
    with _needs_torch():
        from app.training.evaluation.evaluate import Measures, describe, evaluate_model
    measures = Measures(texts=options.text, tasks=options.tasks, limit=options.limit)
    with _stops() as outcome:
        report = evaluate_model(
            find_model(options.model), measures, url=options.url, dtype=options.dtype, threads=options.threads
        )
        answer(describe(report))
        if options.out is not None:
            _write_report(options.out, report)
    return outcome.exit_code


def _write_report(path: Path, report: dict[str, Any]) -> None:
    import json

    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"the report cannot be written to {path}: {error}") from error


@contextmanager
def _needs_torch() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"training needs torch and transformers ({error}); install them with: pip install 'headwater[torch]'"
        ) from error


@dataclass
class _Outcome:
    exit_code: int = 0


@contextmanager
def _stops() -> Iterator[_Outcome]:
    """Tell in one line why a run ended early."""
    from app.training.errors import TrainingStopped

    outcome = _Outcome()
    try:
        yield outcome
    except TrainingStopped as error:
        remark(f"headwater: {error}")
        outcome.exit_code = _EXIT_STOPPED
