"""From a megabyte of text to a streamed completion by three commands; what is served equals what was trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from app.runner.native.families import read_shape
from app.training.evaluation.local import LocalScorer
from app.training.evaluation.scorer import Generation
from app.training.evaluation.served import ServedScorer
from app.training.model import packed_logits
from app.training.packing import Rows
from app.training.shards import open_shards
from app.training.tuning.publish import open_base
from tests.e2e.serving import free_port, headwater, started, wait_ready
from tests.training_texts import write_recipe, write_stories

NUM_DOCUMENTS = 1700
CONTEXT = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first two commands were run."""
    folder = tmp_path_factory.mktemp("three-commands")
    corpus = write_stories(folder / "corpus", num_documents=NUM_DOCUMENTS)
    assert sum(file.stat().st_size for file in corpus.iterdir()) > 1_000_000
    recipe = write_recipe(folder, hidden_size=64, steps=60, context=CONTEXT, rows_per_step=8, learning_rate=1e-2)
    headwater("tokenizer", str(corpus), "--out", str(folder / "data"), "--vocab-size", "512")
    assert "serve it with: headwater serve" in headwater("pretrain", str(recipe))
    return folder


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    """The third command."""
    port, log = free_port(), root / "serve.log"
    model = str(root / "recipe-run" / "model")
    flags = ["--tier", "any", "--dtype", "float32", "--kv-cache-gib", "0.05", "--max-num-seqs", "4"]
    with started(log, "-m", "app.cli", "serve", model, "--port", str(port), *flags) as process:
        address = f"http://127.0.0.1:{port}"
        wait_ready(process, address, log)
        yield address


def test_the_model_made_streams_a_completion_of_its_own_domain(url: str) -> None:
    body = {"prompt": "The river", "max_tokens": 24, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 10
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert any(word in text for word in ("carried", "followed", "left", "watched", "mended", "forgot", "crossed")), text


def test_the_native_tier_knows_every_field_of_the_model_made(root: Path) -> None:
    shape = read_shape(root / "recipe-run" / "model")
    assert (shape.hidden, shape.num_layers, shape.head_dim) == (64, 2, 32)


def test_served_log_likelihoods_are_those_of_training(root: Path, url: str) -> None:
    document = open_shards(root / "data").heldout.document(0)[:CONTEXT].astype(np.int64)
    body = {"prompt": document.tolist(), "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    served = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert served[0] is None
    assert served[1:] == pytest.approx(trained_logprobs(root, document).tolist(), abs=1e-3)


def test_a_model_scores_and_continues_the_same_in_process_and_served(root: Path, url: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = open_base(root / "recipe-run" / "model")
    local, served = LocalScorer(model, tokenizer), ServedScorer(url, context=CONTEXT)
    split = open_shards(root / "data").heldout
    documents = [split.document(index)[: local.context].tolist() for index in range(3)]
    assert served.context == local.context == CONTEXT - 1
    for one, other in zip(local.score(documents), served.score(documents), strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-3)
        assert other.is_first == one.is_first and any(one.is_first)
    asked = [Generation(tuple(ids[:12]), 16, stop) for ids in documents for stop in ((), (".",), (" the", "."))]
    assert local.generate(asked) == served.generate(asked)
    served.close()


@pytest.mark.slow
def test_a_model_measures_the_same_in_process_and_served(root: Path, url: str) -> None:
    """Perplexity, a log-likelihood task and an exact-match task, in the harness's format."""
    tasks = write_harness_tasks(root / "tasks")
    held_out = sorted((root / "corpus").iterdir())[:6]
    reports: list[dict[str, Any]] = []
    wheres: tuple[list[str], ...] = ([], ["--url", url])
    for where in wheres:
        out = root / f"report{len(reports)}.json"
        model = str(root / "recipe-run" / "model")
        flags = ["--text", *map(str, held_out), "--tasks", str(tasks), "--threads", "1", "--out", str(out)]
        printed = headwater("evaluate", model, *flags, *where)
        reports.append(json.loads(out.read_text()))
        assert "bits a byte" in printed and "endings: acc" in printed and "names: exact_match" in printed
    local, served = reports
    assert local["where"] == "in process" and served["where"] == url
    for name in ("num_documents", "num_tokens", "num_bytes"):
        assert local["text"][name] == served["text"][name] > 0
    assert served["text"]["loss"] == pytest.approx(local["text"]["loss"], abs=1e-4)
    assert served["text"]["perplexity"] < 20
    assert served["tasks"] == local["tasks"]
    assert local["tasks"]["endings"]["acc"] >= 0.75, "it has learnt which words end a sentence"
    assert local["tasks"]["names"]["exact_match"] == 1


def write_harness_tasks(folder: Path) -> Path:
    """A choice between a word of the stories and one that is none, and a word that follows for certain."""
    folder.mkdir()
    task = dedent(
        """\
        task: {name}
        dataset_path: json
        dataset_kwargs:
          data_files:
            test: {folder}/{name}.jsonl
        test_split: test
        output_type: {kind}
        doc_to_text: "{{{{question}}}}"
        doc_to_target: "{{{{answer}}}}"
        """
    )
    choice = 'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n'
    match = 'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n'
    (folder / "endings.yaml").write_text(task.format(name="endings", folder=folder, kind="multiple_choice") + choice)
    (folder / "names.yaml").write_text(task.format(name="names", folder=folder, kind="generate_until") + match)
    endings = [
        {"question": f"The river {verb} the stones", "choices": ["before noon", "above moon"], "answer": 0}
        for verb in ("carried", "followed", "left", "crossed")
    ]
    (folder / "endings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in endings))
    names = [{"question": "The rain left the road to town for the third", "answer": " time"}]
    (folder / "names.jsonl").write_text("".join(json.dumps(one) + "\n" for one in names))
    return folder


def trained_logprobs(root: Path, document: np.ndarray) -> torch.Tensor:
    """By the function that the training loop calls, from the weights of its last checkpoint."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(root / "recipe-run" / "model", dtype=torch.float32)
    weights = load_file(root / "recipe-run" / "checkpoints" / "step-000060" / "weights.safetensors")
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    inputs = document[None, :-1]
    rows = Rows(inputs, document[None, 1:], np.arange(inputs.shape[1])[None], np.zeros_like(inputs))
    with torch.no_grad():
        logits = packed_logits(model.eval(), rows, device=torch.device("cpu"), dtype=torch.float32)[0]
    chosen = torch.from_numpy(document[1:, None])
    return nn.functional.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
