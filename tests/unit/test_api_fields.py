"""The tables of fields: complete, free of contradictions, and true of the structs, the engine and the pages."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.api.deps import OpenAIDefaults
from app.api.schemas.chat import ChatRequest, check_chat
from app.api.schemas.completions import CompletionRequest, check_completion
from app.api.schemas.decode import decode_keys, decode_struct
from app.api.schemas.field_rules import FieldTable, Refused, UnknownFields, ignored_header
from app.api.schemas.fields import CHAT, COMPLETIONS, COUNT_TOKENS, MESSAGES, RESPONSES
from app.api.schemas.generation import GenerationRequest
from app.api.schemas.messages import CountTokensRequest, MessagesRequest
from app.api.schemas.reference import PAGES, reference_page
from app.api.schemas.responses import ResponsesRequest
from app.api.translate import sampling_params
from app.core.errors import InvalidRequest
from app.core.types import EngineRequest, SamplingParams

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
ENDPOINTS: dict[str, tuple[FieldTable, type[msgspec.Struct]]] = {
    "completions": (COMPLETIONS, CompletionRequest),
    "chat": (CHAT, ChatRequest),
    "messages": (MESSAGES, MessagesRequest),
    "responses": (RESPONSES, ResponsesRequest),
    "count_tokens": (COUNT_TOKENS, CountTokensRequest),
}
REFUSALS = [
    pytest.param(table, one, id=f"{name}-{one.name}") for name, (table, _) in ENDPOINTS.items() for one in table.refused
]

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
    *("response_format", "structured_outputs"),
}
"""Honoured in the API process; tests/contract tests each."""
REQUEST_SIDE = {"cache_salt", "priority"}
OF_CHAT: dict[str, dict[str, Any]] = {
    "max_completion_tokens": {"max_tokens": 5},
    "logprobs": {"num_logprobs": 0},
}
"""Fields of chat alone that reach the engine → what they change; the values are below."""
CHAT_SIDE = {
    *("messages", "top_logprobs", "add_generation_prompt", "continue_final_message"),
    *(
        "chat_template_kwargs",
        "reasoning_effort",
        "include_reasoning",
        "separate_reasoning",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    ),
}
"""Honoured in the API process; tests/contract/test_chat.py and test_tools.py test each."""


def parse(**fields: object) -> CompletionRequest:
    body = json.dumps(fields).encode()
    return decode_struct(body, CompletionRequest, fields=decode_keys(body))


def raw(**fields: object) -> dict[str, msgspec.Raw]:
    return decode_keys(json.dumps(fields).encode())


def params_of(request: GenerationRequest) -> SamplingParams:
    seed = 1 if request.seed is None else request.seed
    return sampling_params(request, OpenAIDefaults(), seed=seed, room=1000, bad_words=())


def parse_chat(**fields: object) -> ChatRequest:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}]} | fields).encode()
    return decode_struct(body, ChatRequest, fields=decode_keys(body))


@pytest.mark.parametrize("name", ENDPOINTS)
def test_each_field_stands_in_one_list_once(name: str) -> None:
    table, _ = ENDPOINTS[name]
    names = [one[0] for one in (*table.honoured, *table.harmless, *table.refused)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ENDPOINTS)
def test_the_struct_holds_the_honoured_fields_and_no_others(name: str) -> None:
    table, struct = ENDPOINTS[name]
    assert {one.name for one in table.honoured} == set(struct.__struct_fields__)


def test_every_honoured_field_is_accounted_for() -> None:
    """Whoever adds a field must say where it has its effect."""
    shared = {*REACHES_ENGINE, *TEXT_SIDE, *REQUEST_SIDE, "bad_words"}
    assert set(CompletionRequest.__struct_fields__) == shared
    assert set(ChatRequest.__struct_fields__) == (shared - {"prompt"}) | set(OF_CHAT) | CHAT_SIDE


def test_chat_fields_reach_the_engine() -> None:
    before = msgspec.structs.asdict(params_of(parse_chat()))
    values = {"max_completion_tokens": 5, "logprobs": True}
    for name, change in OF_CHAT.items():
        after = msgspec.structs.asdict(params_of(parse_chat(**{name: values[name]})))
        assert after == before | change and after != before
    assert params_of(parse_chat(logprobs=True, top_logprobs=7)).num_logprobs == 7
    assert params_of(parse_chat(top_logprobs=0)).num_logprobs is None


def test_chat_fields_that_need_each_other() -> None:
    assert params_of(parse_chat(max_tokens=5, max_completion_tokens=3)).max_tokens == 3
    assert params_of(parse_chat()).max_tokens == 1000
    check_chat(parse_chat(top_logprobs=0))
    for fields, param in (
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"min_tokens": 3, "max_completion_tokens": 2}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check_chat(parse_chat(**fields))
        assert refused.value.param == param
    with pytest.raises(InvalidRequest, match="max_tokens"):
        parse_chat(max_tokens=0)


def test_every_sampling_parameter_can_be_asked_for() -> None:
    """No SamplingParams field is out of reach, and none is set by a field that does not change it."""
    reached = {name for _, change in REACHES_ENGINE.values() for name in change} | {"bad_words", "grammar"}
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


@pytest.mark.parametrize(("table", "one"), REFUSALS)
@pytest.mark.parametrize("unknown", UnknownFields)
def test_refused_fields_are_refused_under_every_policy(table: FieldTable, one: Refused, unknown: UnknownFields) -> None:
    with pytest.raises(InvalidRequest) as refused:
        table.sort(raw(**{one.name: {}}), unknown=unknown)
    assert refused.value.param == one.name and one.instead in refused.value.message
    assert table.sort(raw(**{one.name: None}), unknown=unknown) == ()


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
        assert COMPLETIONS.sort(fields, unknown=UnknownFields.REFUSE) == (field,)
        return
    with pytest.raises(InvalidRequest) as refused:
        COMPLETIONS.sort(fields, unknown=UnknownFields.REFUSE)
    assert refused.value.param == field


def test_unknown_fields() -> None:
    with pytest.raises(InvalidRequest, match="Did you mean `temperature`") as refused:
        COMPLETIONS.sort(raw(temprature=1), unknown=UnknownFields.REFUSE)
    assert refused.value.code == "unknown_field"
    assert COMPLETIONS.sort(raw(zz=1, aa=2), unknown=UnknownFields.REPORT) == ("aa", "zz")


def test_the_header_cannot_be_broken_by_names() -> None:
    assert ignored_header(["user", "a\r\nset-cookie: x", "é", "x" * 65]) == b"user, and 3 more"
    assert ignored_header([f"f{index}" for index in range(40)]).endswith(b"f31, and 8 more")


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_pages_are_current(name: str) -> None:
    page = REFERENCE / f"{name}.md"
    command = f"python -m app.api.schemas.reference {name} > docs/reference/{name}.md"
    assert page.read_text() == reference_page(PAGES[name]), command


def test_unknown_fields_have_a_default_for_each_endpoint() -> None:
    assert CHAT.sort(raw(zz=1)) == ("zz",)
    with pytest.raises(InvalidRequest):
        COMPLETIONS.sort(raw(zz=1))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("functions", [], True),
        ("functions", [{"name": "f"}], False),
        ("function_call", "auto", True),
        ("modalities", ["text"], True),
        ("modalities", ["text", "audio"], False),
    ],
)
def test_harmless_values_of_chat(field: str, value: object, accepted: bool) -> None:
    if accepted:
        assert CHAT.sort(raw(**{field: value})) == (field,)
        return
    with pytest.raises(InvalidRequest) as refused:
        CHAT.sort(raw(**{field: value}))
    assert refused.value.param == field


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
