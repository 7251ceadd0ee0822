"""The load test's pure parts: arrivals, prompts, event parser, percentiles, figures, plot."""

import itertools
import math
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import arrival_offsets
from loadtest.plot import draw
from loadtest.prompts import token_prompt, word_prompt
from loadtest.record import Outcome, RequestRecord
from loadtest.sse import EventParser
from loadtest.summary import distribution, parse_targets, percentile, summarise


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variance_of_their_distribution(burstiness: float) -> None:
    offsets = arrival_offsets(50, 40_000, seed=3, burstiness=burstiness)
    gaps = [after - before for before, after in itertools.pairwise(offsets)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.variance(gaps) == pytest.approx(1 / (50**2 * burstiness), rel=0.1)
    assert min(gaps) >= 0
    assert offsets[0] == 0


def test_arrivals_are_seeded_and_checked() -> None:
    assert arrival_offsets(5, 20, seed=1) == arrival_offsets(5, 20, seed=1) != arrival_offsets(5, 20, seed=2)
    for rate, burstiness in ((0, 1), (-1, 1), (math.inf, 1), (1, 0), (1, math.nan)):
        with pytest.raises(ValueError, match="above 0"):
            arrival_offsets(rate, 1, seed=0, burstiness=burstiness)


def test_prompts_have_their_length_and_share_their_prefix() -> None:
    words = [word_prompt(40, shared=0.25, seed=7, index=index).split() for index in range(3)]
    ids = [token_prompt(40, shared=0.25, seed=7, index=index, vocab_size=1000) for index in range(3)]
    for prompts in (words, ids):
        assert {len(prompt) for prompt in prompts} == {40}
        assert len({tuple(prompt[:10]) for prompt in prompts}) == 1
        assert len({tuple(prompt[10:]) for prompt in prompts}) == 3
    assert all(256 <= token_id < 1000 for prompt in ids for token_id in prompt)
    assert word_prompt(40, shared=0.25, seed=7, index=2).split() == words[2]


EVENTS = (
    b': keep-alive\n\ndata: {"a": 1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\n'
    b"data: \xe4\xbd\xa0\xe5\xa5\xbd\rid: 3\r\r\n\ndata: [DONE]\n\n"
)
EXPECTED = [b'{"a": 1}', b"two\nlines", "你好".encode(), b"[DONE]"]


@given(st.lists(st.integers(0, len(EVENTS)), max_size=12))
def test_events_are_the_same_however_they_are_split(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(EVENTS)]
    parser = EventParser()
    pieces = [EVENTS[start:end] for start, end in itertools.pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EXPECTED


def test_events_byte_by_byte() -> None:
    parser = EventParser()
    assert [event for byte in EVENTS for event in parser.feed(bytes([byte]))] == EXPECTED


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.sampled_from([0.0, 50.0, 90.0, 99.0, 100.0]))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    import numpy as np

    ordered = sorted(values)
    assert percentile(ordered, percent) == pytest.approx(float(np.percentile(ordered, percent)), rel=1e-9, abs=1e-6)


def test_a_distribution_of_nothing_is_none() -> None:
    assert distribution([]) is None


def test_targets_are_parsed_or_named() -> None:
    assert parse_targets(["ttft:1000", "tpot:1e2"]) == {"ttft": 1000, "tpot": 100}
    for text in ("ttft", "ttft:fast", "speed:1", ""):
        with pytest.raises(ValueError, match="target"):
            parse_targets([text])


MS = 1_000_000


def _record(index: int, **fields: object) -> RequestRecord:
    """Due at 1,000 ms, sent 5 ms late, text at 100, 150 and 250 ms after it was due, end at 260."""
    due = 1000 * MS
    defaults: dict[str, object] = {
        "scheduled_ns": due,
        "sent_ns": due + 5 * MS,
        "output_ns": [due + 100 * MS, due + 150 * MS, due + 250 * MS],
        "end_ns": due + 260 * MS,
        "outcome": Outcome.COMPLETED,
        "prompt_tokens": 10,
        "cached_tokens": 5,
        "output_tokens": 5,
    }
    return RequestRecord(index=index, **(defaults | fields))  # type: ignore[arg-type]


def test_the_formulas() -> None:
    record = _record(0)
    assert record.ttft == pytest.approx(0.100)
    assert record.e2e == pytest.approx(0.260)
    assert record.tpot == pytest.approx(0.160 / 4)
    assert record.itl == pytest.approx([0.050, 0.100])
    assert record.lag == pytest.approx(0.005)
    assert _record(0, output_ns=[]).ttft is None
    assert _record(0, output_tokens=1).tpot is None


def test_the_summary_counts_everything_once() -> None:
    records = [
        _record(0),
        _record(1, end_ns=2000 * MS, output_tokens=3),
        _record(2, outcome=Outcome.REFUSED, detail="429 full", output_ns=[], output_tokens=0),
        _record(3, outcome=Outcome.TRUNCATED, output_tokens=2),
    ]
    summary = summarise(records, targets={"ttft": 100.0, "tpot": 50.0}, offered_rate=None, client_cpu_s=0.25)
    assert summary.duration_s == pytest.approx(1.0)
    assert summary.outcomes == {"completed": 2, "refused": 1, "truncated": 1}
    assert summary.errors == {"429 full": 1}
    assert (summary.completed, summary.output_tokens, summary.prompt_tokens) == (2, 10, 20)
    assert summary.output_tokens_per_s == pytest.approx(10.0)
    assert summary.cached_token_share == 0.5
    assert summary.goodput == pytest.approx(1.0)
    assert summary.goodput_share == 0.25
    assert summary.client_cpu_share == pytest.approx(0.25)
    assert summary.itl_ms is not None and summary.itl_ms.count == 4
    untargeted = summarise(records[2:3], targets={}, offered_rate=4.0, client_cpu_s=0)
    assert (untargeted.goodput, untargeted.ttft_ms, untargeted.offered_rate) == (None, None, 4.0)


def test_the_plot_is_well_formed_even_of_nothing() -> None:
    for records in ([], [_record(0)], [_record(index) for index in range(500)]):
        root = ElementTree.fromstring(draw(records, "a <title> & more"))
        assert root.tag.endswith("svg")
        assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 4
