"""The committed table of sampling cases against the numpy sampler."""

import pytest

from tests.unit.sampling_cases import CASES, Case, draws, gumbel_draws, load_cases


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)
def test_case_draws_the_committed_tokens(case: Case) -> None:
    assert draws(case) == case.expected
    assert gumbel_draws(case) == case.expected_gumbel


def test_the_committed_table_is_the_one_in_the_code() -> None:
    assert [case.name for case in load_cases()] == [case["name"] for case in CASES]
