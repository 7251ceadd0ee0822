"""Measures this model against its marks and writes measured.json beside it.

    headwater serve models/rill-stories-3m --port 8000 --no-page &
    python models/rill-stories-3m/measure.py data --url http://127.0.0.1:8000 --judge FOLDER

`data` is what `headwater tokenizer` wrote; FOLDER holds the default model, which judges the samples. Run from the
repository's root.

1. Bits a byte of the held-out documents, beside a modified Kneser-Ney 5-gram of the same training tokens
   (interpolated, three discounts an order, as Chen and Goodman; the counts of n-grams that begin a document are raw).
2. 100 samples of at most 128 tokens from an empty prompt, drawn by the server (temperature 0.7, top-p 0.95, seeds 0 to
   99): their negative log-likelihood a byte under the judge, beside that of the first 128 tokens of held-out documents.
3. The share of 4-grams of tokens that stood earlier in the same sample.
4. Perplexity of the first tokens of held-out documents as the server gives it, beside float32 in process; with
   `--int8-url`, also as a server with `--quantization int8` gives it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.training.shards import Split, open_shards
from app.training.tokenizer import load_tokenizer

HERE = Path(__file__).parent
ORDER = 5
BITS = 12
"""A token; 5 of them fit an int64."""
NUM_SAMPLES, SAMPLE_TOKENS = 100, 128
Keys = NDArray[np.int64]


class Grams:
    """The n-grams of one order: adjusted counts, discounts, and sums by context."""

    def __init__(self, keys: Keys, counts: NDArray[np.int64]) -> None:
        order = np.argsort(keys)
        self.keys, self.counts = keys[order], counts[order]
        n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        self.discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discounted = self.discounts[np.minimum(self.counts, 3)]
        self.contexts, first = np.unique(self.keys >> BITS, return_index=True)
        self.totals = np.add.reduceat(self.counts, first)
        self.left_over = np.add.reduceat(discounted, first) / self.totals

    def probabilities(self, keys: Keys, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the last token of each n-gram, given that of the n-gram without its first token."""
        place, is_known = _find(self.keys, keys)
        context, is_context = _find(self.contexts, keys >> BITS)
        counts = np.where(is_known, self.counts[place], 0)
        own = np.maximum(counts - self.discounts[np.minimum(counts, 3)], 0) / self.totals[context]
        return np.where(is_context, own + self.left_over[context] * lower, lower)


def _find(sorted_keys: Keys, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return place, sorted_keys[place] == keys


def windows(split: Split, order: int) -> tuple[Keys, NDArray[np.bool_]]:
    """The n-gram that ends at each token, and whether it lies inside one document."""
    tokens = np.asarray(split.tokens, np.int64)
    keys = np.zeros(len(tokens), np.int64)
    for shift in range(order):
        keys[order - 1 :] |= tokens[order - 1 - shift : len(tokens) - shift] << (BITS * shift)
    position = (
        np.arange(len(tokens)) - split.offsets[np.searchsorted(split.offsets, np.arange(len(tokens)), "right") - 1]
    )
    return keys, position >= order - 1


def kneser_ney_bits(train: Split, heldout: Split, *, vocab_size: int, start_id: int) -> float:
    """Bits a byte of every held-out token but the start tokens."""
    grams: dict[int, Grams] = {}
    for order in range(ORDER, 0, -1):
        keys, inside = windows(train, order)
        raw_keys, raw_counts = np.unique(keys[inside], return_counts=True)
        if order == ORDER:
            grams[order] = Grams(raw_keys, raw_counts)
            continue
        longer_keys, longer_inside = windows(train, order + 1)
        suffixes = np.unique(longer_keys[longer_inside]) & ((1 << (BITS * order)) - 1)
        suffix_keys, suffix_counts = np.unique(suffixes, return_counts=True)
        begins = (raw_keys >> (BITS * (order - 1))) == start_id
        if order == 1:
            begins[:] = False  # a start token is never predicted
        grams[order] = Grams(
            np.concatenate([suffix_keys, raw_keys[begins]]), np.concatenate([suffix_counts, raw_counts[begins]])
        )
    probabilities = np.full(len(heldout.tokens), 1 / vocab_size)
    for order in range(1, ORDER + 1):
        keys, inside = windows(heldout, order)
        probabilities = np.where(inside, grams[order].probabilities(keys, probabilities), probabilities)
    is_label = np.asarray(heldout.tokens) != start_id
    return float(-np.log2(probabilities[is_label]).sum() / heldout.facts.num_bytes)


def model_bits(model: nn.Module, split: Split, *, context: int) -> float:
    """Bits a byte; each token sees at least half a context of its document where there is so much."""
    total, stride = 0.0, context // 2
    for index in range(split.facts.num_documents):
        ids = torch.from_numpy(split.document(index).astype(np.int64))
        done = 1
        for begin in range(0, max(len(ids) - stride, 1), stride):
            piece = ids[begin : begin + context]
            logprobs = token_logprobs(model, piece)
            total -= float(logprobs[done - begin - 1 :].sum())
            done = begin + len(piece)
        assert done == len(ids)
    return total / math.log(2) / split.facts.num_bytes


def token_logprobs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the first.  # (num_tokens - 1,)"""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return nn.functional.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]


def judged(judge: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """Negative log-likelihood under the judge, nats a byte over all texts, each after the judge's start token."""
    total, num_bytes = 0.0, 0
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in filter(None, texts):
        ids = torch.tensor([start, *tokenizer(text, add_special_tokens=False).input_ids])
        total -= float(token_logprobs(judge, ids).sum())
        num_bytes += len(text.encode())
    return total / num_bytes


def repeated_share(samples: Sequence[Sequence[int]], size: int = 4) -> float:
    """The share of n-grams that stood earlier in the same sample."""
    num_all = num_repeated = 0
    for ids in samples:
        grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
        num_all += len(grams)
        num_repeated += len(grams) - len(set(grams))
    return num_repeated / max(num_all, 1)


def draw(url: str, *, start_id: int) -> list[tuple[str, list[int]]]:
    """(text, token ids) of each sample."""
    samples = []
    for seed in range(NUM_SAMPLES):
        body = {"prompt": [start_id], "max_tokens": SAMPLE_TOKENS, "temperature": 0.7, "top_p": 0.95, "seed": seed}
        answer = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=300)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        samples.append((choice["text"], choice["token_ids"]))
    return samples


def perplexities(model: nn.Module, urls: Sequence[str], split: Split, *, context: int) -> list[float]:
    """Of the first window of each held-out document: in process, then as each server gives it."""
    totals, num_labels = np.zeros(1 + len(urls)), 0
    for index in range(split.facts.num_documents):
        ids = split.document(index)[:context].astype(np.int64)
        totals[0] -= float(token_logprobs(model, torch.from_numpy(ids)).sum())
        for place, url in enumerate(urls, start=1):
            body = {"prompt": ids.tolist(), "max_tokens": 0, "echo": True, "logprobs": 1}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
            answer.raise_for_status()
            totals[place] -= sum(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:])
        num_labels += len(ids) - 1
    return [math.exp(total / num_labels) for total in totals]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--url", required=True)
    parser.add_argument("--int8-url")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "measured.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards, tokenizer = open_shards(options.data), load_tokenizer(options.data)
    start_id = tokenizer.encode("").ids[0]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    results: dict[str, Any] = {}
    results["bits_per_byte"] = model_bits(model, shards.heldout, context=model.config.max_position_embeddings)
    results["kneser_ney_5_bits_per_byte"] = kneser_ney_bits(
        shards.train, shards.heldout, vocab_size=shards.facts.vocab_size, start_id=start_id
    )
    results["under_kneser_ney"] = 1 - results["bits_per_byte"] / results["kneser_ney_5_bits_per_byte"]
    urls = [url for url in (options.url, options.int8_url) if url is not None]
    context = model.config.max_position_embeddings - 1  # a prompt that fills the context is refused
    for name, value in zip(
        ("perplexity_float32", "perplexity_served", "perplexity_served_int8"),
        perplexities(model, urls, shards.heldout, context=context),
        strict=False,
    ):
        results[name] = value
    samples = draw(options.url, start_id=start_id)
    heldout = [
        shards.heldout.document(index)[1 : SAMPLE_TOKENS + 1].tolist()
        for index in range(min(NUM_SAMPLES, shards.heldout.facts.num_documents))
    ]
    judge_tokenizer = AutoTokenizer.from_pretrained(options.judge)
    judge = AutoModelForCausalLM.from_pretrained(options.judge, dtype=torch.float32).eval()
    results["sample_nll_per_byte"] = judged(judge, judge_tokenizer, [text for text, _ in samples])
    results["heldout_nll_per_byte"] = judged(judge, judge_tokenizer, [tokenizer.decode(ids) for ids in heldout])
    results["nll_ratio"] = results["sample_nll_per_byte"] / results["heldout_nll_per_byte"]
    results["repeated_4grams"] = repeated_share([ids for _, ids in samples])
    results["heldout_repeated_4grams"] = repeated_share(heldout)
    results["mean_sample_tokens"] = sum(len(ids) for _, ids in samples) / len(samples)
    results = {name: round(value, 5) for name, value in results.items()}
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))  # noqa: T201
    for text, _ in samples[:5]:
        print("---\n" + text)  # noqa: T201


if __name__ == "__main__":
    main()
