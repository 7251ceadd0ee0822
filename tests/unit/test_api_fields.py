"""The table of fields: complete, free of contradictions, and true of the struct, the engine and the page."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.api.deps import OpenAIDefaults
from app.api.schemas.completions import CompletionRequest, check_completion
from app.api.schemas.decode import decode_keys, decode_struct
from app.api.schemas.fields import (
    HARMLESS,
    HONOURED,
    REFUSED,
    UnknownFields,
    ignored_header,
    reference_page,
    sort_fields,
)
from app.api.translate import sampling_params
from app.core.errors import InvalidRequest
from app.core.types import EngineRequest, SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "completions.md"

REACHES_ENGINE: dict[str, tuple[object, dict[str, Any]]] = {
    "seed": (5, {"seed": 5}),
    "max_tokens": (5, {"max_tokens": 5}),
    "min_tokens": (5, {"min_tokens": 5}),
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.5, {"min_p": 0.5}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "logit_bias": ({"7": 1.5}, {"logit_bias": ((7, 1.5),)}),
    "allowed_token_ids": ([9, 7, 9], {"allowed_token_ids": (7, 9)}),
    "stop_token_ids": ([9, 7, 9], {"stop_token_ids": (7, 9)}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "logprobs": (3, {"num_logprobs": 3}),
    "prompt_logprobs": (3, {"num_prompt_logprobs": 3}),
}
"""Field → a value, and what of SamplingParams it must change."""
BAD_WORDS = ((1, 2), (3,))
TEXT_SIDE = {
    *("model", "prompt", "n", "stop", "include_stop_str_in_output", "echo", "stream", "stream_options"),
    *("truncate_prompt_tokens", "truncation_side", "add_special_tokens", "skip_special_tokens"),
    *("return_token_ids", "return_tokens_as_token_ids", "request_id"),
}
"""Honoured in the API process; tests/contract tests each."""
REQUEST_SIDE = {"cache_salt", "priority"}


def parse(**fields: object) -> CompletionRequest:
    body = json.dumps(fields).encode()
    return decode_struct(body, CompletionRequest, fields=decode_keys(body))


def raw(**fields: object) -> dict[str, msgspec.Raw]:
    return decode_keys(json.dumps(fields).encode())


def params_of(request: CompletionRequest) -> SamplingParams:
    seed = 1 if request.seed is None else request.seed
    return sampling_params(request, OpenAIDefaults(), seed=seed, room=1000, bad_words=())


def test_each_field_stands_in_one_list_once() -> None:
    names = [one[0] for one in (*HONOURED, *HARMLESS, *REFUSED)]
    assert len(names) == len(set(names))


def test_the_struct_holds_the_honoured_fields_and_no_others() -> None:
    assert {one.name for one in HONOURED} == set(CompletionRequest.__struct_fields__)


def test_every_honoured_field_is_accounted_for() -> None:
    """Whoever adds a field must say where it has its effect."""
    assert set(CompletionRequest.__struct_fields__) == {*REACHES_ENGINE, *TEXT_SIDE, *REQUEST_SIDE, "bad_words"}


def test_every_sampling_parameter_can_be_asked_for() -> None:
    """No SamplingParams field is out of reach, and none is set by a field that does not change it."""
    reached = {name for _, change in REACHES_ENGINE.values() for name in change} | {"bad_words"}
    assert reached == set(SamplingParams.__struct_fields__)
    assert set(EngineRequest.__struct_fields__) >= REQUEST_SIDE


@pytest.mark.parametrize("name", REACHES_ENGINE)
def test_an_engine_field_changes_its_parameter_and_nothing_else(name: str) -> None:
    value, change = REACHES_ENGINE[name]
    before = msgspec.structs.asdict(params_of(parse(prompt="a")))
    after = msgspec.structs.asdict(params_of(parse(prompt="a", **{name: value})))
    assert after == before | change and after != before


def test_bad_words_reach_the_engine() -> None:
    params = sampling_params(parse(prompt="a"), OpenAIDefaults(), seed=1, room=10, bad_words=BAD_WORDS)
    assert params.bad_words == BAD_WORDS


@pytest.mark.parametrize("one", REFUSED, ids=[one.name for one in REFUSED])
@pytest.mark.parametrize("unknown", UnknownFields)
def test_refused_fields_are_refused_under_every_policy(one: Any, unknown: UnknownFields) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sort_fields(raw(prompt="a", **{one.name: {}}), unknown=unknown)
    assert refused.value.param == one.name and one.instead in refused.value.message
    assert sort_fields(raw(prompt="a", **{one.name: None}), unknown=unknown) == ()


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("user", {"any": ["thing"]}, True),
        ("store", False, True),
        ("store", 0, False),
        ("service_tier", "auto", True),
        ("service_tier", "flex", False),
        ("best_of", 1, True),
        ("best_of", 3, True),
        ("best_of", 2, False),
        ("best_of", True, False),
        ("suffix", "", True),
        ("suffix", "x", False),
        ("response_format", {"type": "text"}, True),
        ("response_format", {"type": "text", "x": 1}, False),
        ("use_beam_search", False, True),
        ("use_beam_search", True, False),
        ("length_penalty", 1, True),
        ("length_penalty", 1.0, True),
        ("length_penalty", 2, False),
        ("stream_interval", 1, True),
        ("stream_interval", 5, False),
        ("cache_prompt", False, False),
        ("spaces_between_special_tokens", False, False),
    ],
)
def test_harmless_values_are_accepted_and_others_refused(field: str, value: object, accepted: bool) -> None:
    fields = raw(prompt="a", n=3, **{field: value})
    if accepted:
        assert sort_fields(fields, unknown=UnknownFields.REFUSE) == (field,)
        return
    with pytest.raises(InvalidRequest) as refused:
        sort_fields(fields, unknown=UnknownFields.REFUSE)
    assert refused.value.param == field


def test_unknown_fields() -> None:
    with pytest.raises(InvalidRequest, match="Did you mean `temperature`") as refused:
        sort_fields(raw(temprature=1), unknown=UnknownFields.REFUSE)
    assert refused.value.code == "unknown_field"
    assert sort_fields(raw(zz=1, aa=2), unknown=UnknownFields.REPORT) == ("aa", "zz")


def test_the_header_cannot_be_broken_by_names() -> None:
    assert ignored_header(["user", "a\r\nset-cookie: x", "é", "x" * 65]) == b"user, and 3 more"
    assert ignored_header([f"f{index}" for index in range(40)]).endswith(b"f31, and 8 more")


def test_the_reference_page_is_current() -> None:
    assert PAGE.read_text() == reference_page(), "python -m app.api.schemas.fields > docs/reference/completions.md"


def test_defaults_of_the_model_come_before_ours_and_after_the_clients() -> None:
    defaults = OpenAIDefaults(temperature=0.2, top_p=0.9, top_k=50, min_p=0.1, repetition_penalty=1.1)
    params = sampling_params(parse(prompt="a"), defaults, seed=1, room=10, bad_words=())
    assert (params.temperature, params.top_p, params.top_k) == (0.2, 0.9, 50)
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.1)
    asked = parse(prompt="a", temperature=0, top_p=1, top_k=-1, min_p=0, repetition_penalty=1)
    params = sampling_params(asked, defaults, seed=1, room=10, bad_words=())
    assert (params.temperature, params.top_p, params.top_k) == (0, 1, 0)
    assert (params.min_p, params.repetition_penalty) == (0, 1)


def test_max_tokens_is_cut_to_the_room_and_min_tokens_with_it() -> None:
    request = parse(prompt="a", max_tokens=50, min_tokens=40)
    params = sampling_params(request, OpenAIDefaults(), seed=1, room=10, bad_words=())
    assert (params.max_tokens, params.min_tokens) == (10, 10)


def test_echo_asks_for_the_larger_count_of_prompt_logprobs() -> None:
    assert params_of(parse(prompt="a", echo=True, logprobs=2)).num_prompt_logprobs == 2
    assert params_of(parse(prompt="a", echo=True, logprobs=2, prompt_logprobs=5)).num_prompt_logprobs == 5
    assert params_of(parse(prompt="a", logprobs=2)).num_prompt_logprobs is None


def test_a_tiny_temperature_is_greedy() -> None:
    assert params_of(parse(prompt="a", temperature=1e-6)).temperature == 0
    assert params_of(parse(prompt="a", temperature=1e-5)).temperature == 1e-5


def test_max_tokens_0_needs_echo() -> None:
    check_completion(parse(prompt="a", max_tokens=0, echo=True))
    with pytest.raises(InvalidRequest) as refused:
        check_completion(parse(prompt="a", max_tokens=0))
    assert refused.value.param == "max_tokens"
