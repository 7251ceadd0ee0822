"""Recipes, learning rates, metrics and the report."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from app.cli import main
from app.core.errors import ConfigurationError
from app.training.metrics import MetricsFile, read_metrics
from app.training.recipe import ScheduleTable, load_recipe
from app.training.report import write_report
from app.training.schedule import learning_rate
from app.training.tuning.recipe import load_tuning_recipe
from tests.training_texts import write_recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "hidden_size 32 is no multiple of model.heads 3"),
        ({"steps": 0}, r"Expected `int` >= 1 - at `\$.train.steps`"),
        ({"warmup_steps": 9}, "warmup_steps and decay_steps are more than train.steps 8"),
        ({"architecture": '"rnn"'}, "Invalid enum value 'rnn'"),
        ({"accumulation": 3}, "rows_per_step 4 is no multiple of train.accumulation 3"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_recipe(write_recipe(tmp_path, name="recipe", **changes))


def test_the_recipes_of_the_guide_can_be_used(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "train.md").read_text(encoding="utf-8")
    pretraining, tuning = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    path = tmp_path / "recipe.toml"
    path.write_text(pretraining)
    assert load_recipe(path).model.layers == 5
    path.write_text(tuning)
    assert load_tuning_recipe(path).method.kind == "lora"


def test_commands_tell_bad_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(tmp_path / "none.toml")]) == 2
    assert main(["tokenizer", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert main(["pretrain", str(write_recipe(tmp_path))]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "the recipe" in errors[0] and "the corpus is empty" in errors[1] and "no whole token shards" in errors[2]


def test_cosine_warms_up_and_ends_at_its_share() -> None:
    schedule = ScheduleTable(kind="cosine", learning_rate=1.0, warmup_steps=4, last_share=0.1)
    rates = [learning_rate(schedule, step, steps=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert all(one >= other for one, other in pairwise(rates[3:]))


def test_wsd_is_constant_until_the_last_steps() -> None:
    schedule = ScheduleTable(kind="wsd", learning_rate=1.0, warmup_steps=2, decay_steps=5, last_share=0.0)
    rates = [learning_rate(schedule, step, steps=20) for step in range(20)]
    assert rates[1:15] == [1.0] * 14
    assert rates[14:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_metrics_of_a_resumed_run_drop_what_lay_ahead(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    metrics = MetricsFile(path, resumed_step=1)
    metrics.write({"step": 2, "loss": 2.5})
    metrics.close()
    assert list(read_metrics(path)) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_report_holds_the_curves_and_needs_nothing_else(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"step": step, "loss": 5 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9, "seconds": 60}
        for step in range(1, 2000)
    ]
    records.append({"step": 2, "heldout_loss": 2.0, "heldout_perplexity": 7.4, "heldout_bits_per_byte": 0.9})
    records.append({"step": 2, "sample": "<b>not markup</b>"})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = write_report(tmp_path).read_text()
    assert page.count("<svg") == 6
    assert "&lt;b&gt;not markup" in page and "<b>" not in page
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert len(page) < 200_000
