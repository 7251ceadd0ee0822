"""Fine-tuning: what moves, what is learnt, when it ends, and what is left behind."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.cli import main
from app.core.errors import ConfigurationError
from app.training.errors import TrainingStopped
from app.training.metrics import read_metrics
from app.training.pretrain import pretrain
from app.training.tuning.adapters import open_adapter
from app.training.tuning.encoding import Encoded, Encoder
from app.training.tuning.examples import Chat, Example, Message, Pair, Plain
from app.training.tuning.finetune import finetune, open_finetuning
from app.training.tuning.methods import choose_parameters, make_tuner
from app.training.tuning.publish import open_base
from app.training.tuning.recipe import MethodTable, TrainTable
from app.training.tuning.run import Tuning, open_tuning
from app.training.tuning.tune import evaluate, tune, tune_step
from tests.training_texts import make_shards, toy_recipe
from tests.tuning_texts import converse, tuning_recipe, write_tasks, write_tuning_recipe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and the toy tasks."""
    folder = tmp_path_factory.mktemp("tuning")
    make_shards(folder)
    model = pretrain(toy_recipe(folder, steps=4, layers=3, context=128))
    assert model is not None
    shutil.copytree(model, folder / "base")
    tasks = write_tasks(folder / "tasks.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(tasks[:80]))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed_layers(root: Path, model: Path) -> set[str]:
    """Names of tensors that differ from the base, in float32."""
    before, after = weights(root / "base"), weights(model)
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_whole_model_moves(root: Path) -> None:
    done = finetune(tuning_recipe(root, name="whole"), find_model=Path)
    assert done.folder == root / "whole-run" / "model"
    assert changed_layers(root, done.folder) == set(weights(root / "base"))
    assert done.after.loss < done.before.loss
    assert "<svg" in (root / "whole-run" / "report.html").read_text()


def test_the_last_layers_move_alone(root: Path) -> None:
    done = finetune(tuning_recipe(root, name="last", kind='"last_layers"', method="layers = 2"), find_model=Path)
    changed = changed_layers(root, done.folder)
    assert {name for name in changed if "layers.0" in name or "embed" in name} == set()
    assert {name for name in weights(root / "base") if "layers.1" in name or "layers.2" in name} <= changed
    assert "model.norm.weight" in changed
    assert done.after.loss < done.before.loss
    with pytest.raises(ConfigurationError, match=r"method.layers 4 is more than the model's 3"):
        finetune(tuning_recipe(root, name="last4", kind='"last_layers"', method="layers = 4"), find_model=Path)


def test_an_adapter_merges_into_what_it_was_beside_its_model(root: Path) -> None:
    changes: dict[str, object] = {"kind": '"lora"', "method": "rank = 4", "learning_rate": 1e-2}
    done = finetune(tuning_recipe(root, name="lora", **changes), find_model=Path)
    assert done.after.loss < done.before.loss
    adapter, out = root / "lora-run" / "adapter", root / "merged"
    assert main(["merge", str(adapter), "--model", str(root / "base"), "--out", str(out)]) == 0
    assert {name: tensor.tolist() for name, tensor in weights(out).items()} == {
        name: tensor.tolist() for name, tensor in weights(done.folder).items()
    }
    assert (out / "generation_config.json").read_bytes() == (done.folder / "generation_config.json").read_bytes()
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        apart = open_adapter(base, adapter).eval()(input_ids=ids).logits
        together = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
    assert torch.allclose(apart, together, atol=1e-4)
    alone = finetune(tuning_recipe(root, name="alone", merge="false", **changes), find_model=Path)
    assert alone.folder == root / "alone-run" / "adapter" and not (root / "alone-run" / "model").exists()


@pytest.mark.parametrize(("kind", "method"), [('"lora"', "rank = 4"), ('"last_layers"', "layers = 1")])
def test_the_gpt2_shape_is_tuned_too(root: Path, kind: str, method: str) -> None:
    model = pretrain(toy_recipe(root, name="gpt2", architecture='"gpt2"', steps=2, context=128))
    recipe = tuning_recipe(
        root, name=f"gpt2-{method[0]}", model=f'"{model}"', kind=kind, method=method, epochs=1, learning_rate=1e-2
    )
    done = finetune(recipe, find_model=Path)
    assert done.after.loss < done.before.loss
    before, after = weights(Path(recipe.model)), weights(done.folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("wte" in name or "wpe" in name for name in changed)


def test_no_model_is_written_over_the_one_that_it_comes_from(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "base", root / "over-run" / "model")
    before = weights(root / "over-run" / "model")
    recipe = write_tuning_recipe(root, name="over", model='"over-run/model"')
    base = str(root / "base")
    for arguments in (["finetune", str(recipe)], ["merge", str(root), "--model", base, "--out", base]):
        assert main(arguments) == 2
        assert "is the model that this one would be made from" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(root / "over-run" / "model").items())


def test_rates_fall_with_depth(root: Path) -> None:
    model, _ = open_base(root / "base")
    groups = make_tuner(model, TrainTable(learning_rate=1.0, depth_decay=0.5)).parts[0].param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[parameter]: group["scale"] for group in groups for parameter in group["params"]}
    assert scales["model.norm.weight"] == scales["model.layers.2.mlp.up_proj.weight"] == 1
    assert scales["model.layers.1.mlp.up_proj.weight"] == scales["model.layers.1.input_layernorm.weight"] == 0.5
    assert (scales["model.layers.0.mlp.up_proj.weight"], scales["model.embed_tokens.weight"]) == (0.25, 0.125)
    decays = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in names.values() if "norm" in name}


def toy_run(root: Path, *, name: str, **changes: object) -> Tuning:
    """A run over four examples of two tokens each."""
    recipe = tuning_recipe(root, name=name, **changes)
    base, _ = open_base(root / "base")
    model = choose_parameters(base, MethodTable(kind="whole"), base="base").train()
    examples = [Encoded((10 + number, 20 + number), (False, True)) for number in range(4)]
    return open_tuning(recipe, model, train=examples[:3], validation=examples[3:], inputs_sha256="of a toy", device=CPU)


def test_a_run_ends_early_and_keeps_the_best(root: Path) -> None:
    """What is learnt is of no use to the validation example, whose loss soon rises."""
    run = toy_run(root, name="early", epochs=500, learning_rate=1e-2, patience=2)
    before, after = tune(run, description="")
    assert run.step < run.steps and run.num_worse == 2
    losses = [
        float(str(one["heldout_loss"])) for one in read_metrics(run.folder / "metrics.jsonl") if "heldout_loss" in one
    ]
    assert after.loss == pytest.approx(min(losses), abs=1e-5) and min(losses) < losses[-1]
    assert losses.index(min(losses)) == len(losses) - 3
    again = toy_run(root, name="early", epochs=500, learning_rate=1e-2, patience=2)
    assert tune(again, description="") == (before, after)
    assert (again.step, again.best, again.best_step) == (run.step, run.best, run.best_step)


class Interrupting(list[Encoded]):
    """Examples, of which the one that is read as the n-th does something first."""

    def __init__(self, examples: Sequence[Encoded], *, after: int, then: Callable[[], object]) -> None:
        super().__init__(examples)
        self._left, self._then = after, then

    def __getitem__(self, index: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self._then()
        return super().__getitem__(index)


def crash() -> None:
    raise MemoryError("as any failure that no part of a run expects")


@pytest.mark.parametrize(
    ("name", "method", "then"),
    [
        ("whole", {"learning_rate": 3e-3}, crash),
        (
            "dropout",
            {"kind": '"lora"', "method": "rank = 4\ndropout = 0.2", "learning_rate": 1e-2},
            lambda: signal.raise_signal(signal.SIGTERM),
        ),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(
    root: Path, name: str, method: dict[str, object], then: Callable[[], object]
) -> None:
    """It breaks off behind an evaluation that was the best yet, between two checkpoints."""
    changes = {"files": '["few.jsonl"]', "epochs": 3, "evaluate_every": 3, "checkpoint_every": 4, **method}
    unbroken = finetune(tuning_recipe(root, name=f"{name}-unbroken", **changes), find_model=Path)
    recipe = tuning_recipe(root, name=f"{name}-broken", **changes)
    run = open_finetuning(recipe, find_model=Path).run
    run.train = Interrupting(run.train, after=6 * 16 + 1, then=then)
    with suppress(MemoryError):
        tune(run, description="")
    assert run.best_step == 6
    resumed = finetune(recipe, find_model=Path)
    assert (resumed.before, resumed.after) == (unbroken.before, unbroken.after)
    ours, theirs = weights(resumed.folder), weights(unbroken.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert figures(run.folder) == figures(unbroken.folder.parent)
    assert len(list((run.folder / "best").iterdir())) == 1


def figures(folder: Path) -> list[dict[str, object]]:
    """What a run recorded, without times."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def test_a_stopped_run_gives_what_was_best_until_then(root: Path) -> None:
    """Even weights that no evaluation has seen; and a finished run is not run again."""
    recipe = tuning_recipe(root, name="stopped", files='["few.jsonl"]', evaluate_every=1000)
    run = open_finetuning(recipe, find_model=Path).run
    run.train = Interrupting(run.train, after=3 * 16, then=lambda: signal.raise_signal(signal.SIGINT))
    before, after = tune(run, description="")
    assert run.step == 3 and run.best == before.loss and after.loss < before.loss
    first = finetune(recipe, find_model=Path)
    recorded = (run.folder / "metrics.jsonl").read_bytes()
    again = finetune(recipe, find_model=Path)
    assert (again, (run.folder / "metrics.jsonl").read_bytes()) == (first, recorded)


def test_a_run_is_not_resumed_with_another_recipe_model_or_examples(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrained = pretrain(toy_recipe(root, name="retrained", steps=2, layers=3, context=128))
    changes: dict[str, object] = {"files": '["few.jsonl"]', "epochs": 1}
    done = finetune(tuning_recipe(root, name="resumed", **changes), find_model=Path)

    def refusal(**more: object) -> str:
        assert main(["finetune", str(write_tuning_recipe(root, name="resumed", **(changes | more)))]) == 2
        return capsys.readouterr().err

    assert "made with train.examples_per_step = 16, the recipe now says 8" in refusal(examples_per_step=8)
    assert "made from another model or from other examples" in refusal(files='["tasks.jsonl"]')
    assert "made from another model or from other examples" in refusal(model=f'"{retrained}"')
    (best,) = (done.folder.parent / "best").iterdir()
    best.unlink()
    assert f"needs {best}, which is gone" in refusal()


def test_padding_changes_no_loss(root: Path) -> None:
    base, _ = open_base(root / "base")
    short, long = Encoded((5, 6, 7), (False, True, True)), Encoded(tuple(range(30, 42)), (False,) * 4 + (True,) * 8)
    apart = [evaluate(base, [one], dtype=torch.float32, device=CPU).loss for one in (short, long)]
    run = toy_run(root, name="padding", examples_per_step=2)
    run.train = [short, long]
    run.metrics.close()
    loss, _ = tune_step(run)
    assert loss == pytest.approx((apart[0] * 2 + apart[1] * 8) / 10, rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_the_examples_and_what_is_kept(root: Path) -> None:
    run = toy_run(root, name="nan")
    with torch.no_grad():
        next(run.model.parameters())[:] = math.nan
    with pytest.raises(
        TrainingStopped, match=r"loss of step 1 is nan \(examples \[.*There is no checkpoint yet; lower"
    ):
        tune_step(run)
    with pytest.raises(TrainingStopped, match="validation loss after step 0 is nan"):
        tune(run, description="")


@pytest.mark.parametrize("name", ["best", "checkpoints"])
def test_a_full_disk_is_told_with_what_is_kept(root: Path, name: str) -> None:
    run = toy_run(root, name=f"full-{name}")
    # A file where the folder would be: writing fails as on a disk without room, for root too.
    (run.folder / name).write_text("in the way")
    with pytest.raises(TrainingStopped, match=r"cannot be written: .*There is no checkpoint yet"):
        tune(run, description="")


def tokenizer_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False))


def answers(encoder: Encoder, tokenizer: Any, example: Example) -> list[str]:
    """Texts of the runs of tokens that the loss counts."""
    encoded = encoder.encode(example)
    runs = groupby(zip(encoded.token_ids, encoded.is_answer, strict=True), key=lambda pair: pair[1])
    return [tokenizer_text(tokenizer, [token_id for token_id, _ in run]) for is_answer, run in runs if is_answer]


def test_answers_alone_are_learnt_and_end_where_a_server_stops(root: Path) -> None:
    _, tokenizer = open_base(root / "base")
    encoder = Encoder(tokenizer, end_id=0)
    chat = Chat(tuple(Message(**message) for message in converse("fox", "found", "kite")))
    assert answers(encoder, tokenizer, chat) == ["Tell me more.<|im_end|>", "The fox found it.<|im_end|>"]
    assert encoder.turn_ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    whole = tokenizer.apply_chat_template(converse("fox", "found", "kite"), tokenize=False)
    assert tokenizer_text(tokenizer, encoder.encode(chat).token_ids) == whole
    assert answers(encoder, tokenizer, Pair("The fox", " ran.")) == [" ran.<|endoftext|>"]
    assert encoder.encode(Pair("The fox", " ran.")).token_ids[0] == tokenizer.bos_token_id
    assert answers(encoder, tokenizer, Plain("The fox ran.")) == ["The fox ran.<|endoftext|>"]
    tokenizer.chat_template = "{% for message in messages %}{{ loop.length }}{{ message.content }}\n{% endfor %}"
    with pytest.raises(ConfigurationError, match="writes earlier turns anew"):
        encoder.encode(chat)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ConfigurationError, match="chat template refuses an example: no such role"):
        encoder.encode(chat)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{}", "line 2 is no example: `text` is missing"),
        (b'{"prompt": "a"}', "line 2 is no example: `completion` is missing"),
        (b'{"prompt": "a", "completion": ""}', "line 2 is no example: `completion` is empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2 is no example: `messages` has no answer"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "line 2 is no example: role 'bot' is none of"),
        (b"[1]", "line 2 is no example: it is no JSON object"),
        (b'{"text": "\\ud800"}', "line 2 is no example: .*surrogates not allowed"),
        (b"\xff", "is no UTF-8: byte 23 is 0xff"),
    ],
)
def test_examples_that_cannot_be_used_are_named(
    root: Path, capsys: pytest.CaptureFixture[str], line: bytes, message: str
) -> None:
    (root / "bad.jsonl").write_bytes(b'{"text": "The river."}\n' + line)
    recipe = write_tuning_recipe(root, name="bad", files='["bad.jsonl"]')
    assert main(["finetune", str(recipe)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(message, error), error
    assert not (root / "bad-run").exists()


def test_what_does_not_fit_is_told_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "one.jsonl").write_text('{"text": "The river carried the stones before noon."}\n' * 2)
    (root / "none.jsonl").write_text("\n")
    shutil.copytree(root / "base", root / "other", dirs_exist_ok=True)
    tokenizer: dict[str, Any] = json.loads((root / "base" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["later"] = 10_000
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 10_001, "content": "<|more|>"})
    (root / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases = {
        'files=["gone.jsonl"]': "gone.jsonl is not there",
        'files=["none.jsonl"]': "no examples in",
        'files=["one.jsonl"]': "there is one example",
        'kind="last_layers"': "last_layers needs method.layers",
        "context=4": "no training example has at most 4 tokens",
        'model="other"': "they do not belong together",
        'model="nowhere"': "'nowhere' is no folder",
    }
    for change, message in cases.items():
        name, _, value = change.partition("=")
        assert main(["finetune", str(write_tuning_recipe(root, name="unfit", **{name: value}))]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1, errors
