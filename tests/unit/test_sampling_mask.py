"""A grammar's bitmask: part of the changes before temperature, never of the logprobs, the same on every sampler."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.core.plan import RowStart
from app.core.types import Grammar, GrammarKind, SamplingParams
from app.runner.native.rows import Row
from app.runner.sampling import RowError, RowSampler
from app.runner.sampling.draw import draw_gumbel
from app.runner.sampling.logprobs import token_logprobs

VOCAB = 301
"""No multiple of 32: the last word of a mask has bits that stand for nothing."""


def sampler(**fields: Any) -> RowSampler:
    return RowSampler(start(**fields), VOCAB, (0,))


def start(**fields: Any) -> RowStart:
    return RowStart("r", SamplingParams(**({"seed": 11, "max_tokens": 99} | fields)), (1, 2, 3), ())


def logits(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


def mask_of(allowed: set[int], *, num_words: int = 10) -> NDArray[np.int32]:
    """Bits beyond the vocabulary are set, and there may be more words than it needs."""
    words = [0] * num_words
    for token_id in allowed | set(range(VOCAB, 32 * num_words)):
        words[token_id // 32] |= 1 << token_id % 32
    return np.array(words, dtype=np.uint32).view(np.int32)


def test_greedy_takes_the_largest_allowed() -> None:
    row = logits(0)
    order = np.argsort(-row)
    best, third = int(order[0]), int(order[2])
    assert sampler(temperature=0.0).sample_row(row, 3)[0] == best
    assert sampler(temperature=0.0).sample_row(row, 3, mask=mask_of({0, third}))[0] == third


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}, {"temperature": 0.2}], ids=str)
def test_a_mask_is_as_good_as_allowed_token_ids(fields: dict[str, Any]) -> None:
    allowed = {3, 31, 32, 63, 64, 200, 299, 300}
    for position in range(40):
        row = logits(position)
        masked = sampler(**fields).sample_row(row, position, mask=mask_of(allowed, num_words=12))
        listed = sampler(allowed_token_ids=tuple(sorted(allowed)), **fields).sample_row(row, position)
        assert masked == listed and masked[0] in allowed


def test_logprobs_are_of_the_raw_logits() -> None:
    row = logits(1)
    token_id, logprobs = sampler(num_logprobs=3).sample_row(row, 3, mask=mask_of({5}))
    assert token_id == 5
    assert logprobs == token_logprobs(row, 5, 3)


def test_what_a_mask_and_the_rest_leave_empty_fails_alone() -> None:
    with pytest.raises(RowError, match="grammar"):
        sampler(bad_words=((5,),)).sample_row(logits(2), 3, mask=mask_of({5}))


def test_a_row_with_a_grammar_needs_its_logits() -> None:
    grammar = Grammar(GrammarKind.REGEX, "a")
    assert Row(start(temperature=0.0), vocab_size=VOCAB, eos_token_ids=(0,)).takes_largest(3)
    row = Row(start(temperature=0.0, grammar=grammar), vocab_size=VOCAB, eos_token_ids=(0,))
    assert not row.takes_largest(3)


def test_the_torch_sampler_masks_some_rows_of_a_batch() -> None:
    torch = pytest.importorskip("torch", reason="the torch port needs torch")
    batch = pytest.importorskip("app.runner.torch.sampling.batch")
    torch.set_num_threads(1)
    allowed = {7, 31, 32, 290, 300}
    masks = [None, mask_of(allowed), mask_of({300}), None, mask_of(allowed, num_words=12)]
    temperatures = (1.0, 1.0, 1.0, 0.0, 0.0)
    rows = np.stack([logits(index) for index in range(len(masks))])
    requests = [
        batch.DrawRequest(sampler(temperature=temperature, num_logprobs=1), 3, mask)
        for temperature, mask in zip(temperatures, masks, strict=True)
    ]
    drawn = batch.DeviceSampler((len(rows),), torch.device("cpu")).draw(torch.from_numpy(rows), requests)
    for row, temperature, mask, one in zip(rows, temperatures, masks, drawn, strict=True):
        changed = row if mask is None else np.where(np.isin(np.arange(VOCAB), bits(mask)), row, -np.inf)
        assert one.error is None
        assert one.token_id == draw_gumbel(changed.astype(np.float32), start(temperature=temperature).params, 3)
        assert one.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(token_logprobs(row, one.token_id, 1).logprob, abs=1e-5)


def bits(mask: NDArray[np.int32]) -> list[int]:
    return [index for index in range(VOCAB) if int(mask[index // 32]) >> (index % 32) & 1]
