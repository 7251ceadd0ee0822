"""The model that comes with Headwater: served in bfloat16 and in int8, it is the model that was trained."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from app.settings import OFFLINE_MODEL
from app.store import resolve
from app.training.evaluation.local import LocalScorer
from app.training.evaluation.perplexity import score_texts
from app.training.evaluation.served import ServedScorer
from app.training.tuning.publish import open_base
from tests.e2e.serving import free_port, started, wait_ready

NUM_STORIES = 24
MOST_OFF = 0.005
"""Of perplexity, as a share of that in float32."""


def quiet(_line: str) -> None:
    """Reports are not wanted here."""


@pytest.mark.parametrize("flags", [(), ("--quantization", "int8")], ids=["bfloat16", "int8"])
def test_perplexity_is_that_of_training(tmp_path: Path, flags: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    folder = resolve(OFFLINE_MODEL, report=quiet).path
    lines = gzip.decompress((folder / "stories.jsonl.gz").read_bytes()).decode().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:NUM_STORIES]]
    model, tokenizer = open_base(folder)
    local = score_texts(LocalScorer(model, tokenizer), tokenizer, texts, start_id=tokenizer.bos_token_id)
    port, log = free_port(), tmp_path / "serve.log"
    arguments = ["-m", "app.cli", "serve", "--offline", "--port", str(port), "--kv-cache-gib", "0.05", *flags]
    with started(log, *arguments) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        scorer = ServedScorer(url, context=model.config.max_position_embeddings)
        served = score_texts(scorer, tokenizer, texts, start_id=tokenizer.bos_token_id)
        scorer.close()
    assert served.num_tokens == local.num_tokens
    assert served.perplexity == pytest.approx(local.perplexity, rel=MOST_OFF)
