"""`POST /v1/completions` as OpenAI's own client and evaluation harnesses use it."""

from typing import Any

import openai
import pytest

from app.api.translate import derive_seed
from app.core.types import FinishReason
from tests.contract.fake_engine import END
from tests.contract.serving import MODEL, TEXT, FakeServer, fake_server
from tests.text_tokenizers import byte_level

NUM_TOKENS = len(byte_level().encode_now(TEXT, False))


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def test_openai_client_gets_a_completion(server: FakeServer) -> None:
    answer = server.client.completions.create(model=MODEL, prompt="你好 🌍", max_tokens=200)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == MODEL
    assert answer.system_fingerprint == "fp-test"
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (TEXT, "stop", 0, None)
    assert answer.usage is not None
    num_prompt = len(byte_level().encode_now("你好 🌍", False))
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == NUM_TOKENS + 1  # the end token counts
    assert answer.usage.total_tokens == num_prompt + NUM_TOKENS + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_openai_client_streams(server: FakeServer) -> None:
    stream = server.client.completions.create(
        model=MODEL, prompt="Hi", max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert "\ufffd" not in TEXT and all("\ufffd" not in chunk.choices[0].text for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * NUM_TOKENS + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == NUM_TOKENS + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_asynchronous_client(server: FakeServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(model=MODEL, prompt=["Hi", "你好"], max_tokens=200, n=2)
        assert [choice.text for choice in answer.choices] == [TEXT] * 4
        stream = await client.completions.create(model=MODEL, prompt="Hi", max_tokens=200, logprobs=2, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
        assert MODEL in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(MODEL)).id == MODEL


def test_answers_pass_the_clients_strict_validation(server: FakeServer) -> None:
    """But for nulls that OpenAI's server sends too and its client's types lack: a finish reason before the end of a
    stream, and the log-probability of an echoed prompt's first token.
    """
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        answer = client.completions.create(model=MODEL, prompt=["Hi", "你好"], max_tokens=200, logprobs=2, seed=1)
        assert [choice.text for choice in answer.choices] == [TEXT, TEXT]
        assert MODEL in [model.id for model in client.models.list()]


@pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 200},
        {"max_tokens": 23},
        {"max_tokens": 200, "stop": ["世界", "🚀"]},
        {"max_tokens": 200, "stop": "🚀 na", "include_stop_str_in_output": True},
        {"max_tokens": 200, "stop": "👨", "logprobs": 3},
        {"max_tokens": 200, "stop": "Hello", "min_tokens": 1},
        {"max_tokens": 200, "stop": "e", "min_tokens": 20},
        {"max_tokens": 90, "ignore_eos": True, "skip_special_tokens": False},
        {"max_tokens": 200, "stop_token_ids": [byte_level().encode_now("v", False)[0]]},
        {"max_tokens": 30, "n": 2, "echo": True, "logprobs": 1, "return_token_ids": True, "prompt": ["你", "🌍x"]},
        {"max_tokens": 0, "echo": True, "logprobs": 2},
    ],
    ids=str,
)
def test_the_joined_stream_is_the_whole_answer(
    server: FakeServer, fields: dict[str, Any], tokens_per_output: int
) -> None:
    server.engine.tokens_per_output = tokens_per_output
    try:
        whole = server.complete(**fields)
        chunks = server.stream(**fields, stream_options={"include_usage": True})
    finally:
        server.engine.tokens_per_output = 1
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if choice["logprobs"] else ():
            assert [item for part in parts for item in part["logprobs"][name]] == choice["logprobs"][name]
        if "token_ids" in choice:
            assert [item for part in parts for item in part["token_ids"]] == choice["token_ids"]
            assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]


@pytest.mark.parametrize("stop", ["世界", "世", "🌍", "🌍🚀", " naïve café", "\n\n1.", "‍👩", "很好 👩", "the end"])
def test_a_stop_string_is_never_leaked(server: FakeServer, stop: str) -> None:
    chunks = server.stream(max_tokens=200, stop=["not there", stop], stream_options={"include_usage": True})
    assert joined(chunks) == TEXT[: TEXT.index(stop)]
    assert chunks[-2]["choices"][0]["stop_reason"] == stop
    # Usage counts up to the token that completed the match, though the engine went on until it was told.
    upto = byte_level().encode_now(TEXT[: TEXT.index(stop) + len(stop)], False)
    assert abs(chunks[-1]["usage"]["completion_tokens"] - len(upto)) <= 1
    assert len(server.engine.aborted) == 1


def test_min_tokens_holds_stop_strings_off(server: FakeServer) -> None:
    answer = server.complete(max_tokens=200, stop=["l", "v"], min_tokens=4)
    # "Hell" are the first four tokens: no stop string is looked for in them.
    assert answer["choices"][0]["text"] == TEXT[: TEXT.index("v")]


def test_stop_tokens_count_but_are_no_text(server: FakeServer) -> None:
    (stop,) = byte_level().encode_now(",", False)
    answer = server.complete(max_tokens=200, stop_token_ids=[stop])
    assert answer["choices"][0]["text"] == TEXT[: TEXT.index(",")]
    assert answer["choices"][0]["stop_reason"] == stop
    kept = server.complete(max_tokens=200, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == TEXT[: TEXT.index(",") + 1]
    assert kept["usage"] == answer["usage"]


def test_a_stop_string_across_tokens_of_one_output_drops_the_rest(server: FakeServer) -> None:
    server.engine.tokens_per_output = 1000
    try:
        answer = server.complete(max_tokens=200, stop="世", logprobs=0)
    finally:
        server.engine.tokens_per_output = 1
    choice = answer["choices"][0]
    assert choice["text"] == "Hello 你好, " and choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]
    assert answer["usage"]["completion_tokens"] == len(byte_level().encode_now("Hello 你好, 世", False))


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hi 你", ["Hi 你"]),
        (["Hi", "你好 🌍"], ["Hi", "你好 🌍"]),
        (byte_level().encode_now("🌍", False), ["🌍"]),
        ([byte_level().encode_now("你好", False), byte_level().encode_now("b", False)], ["你好", "b"]),
        (["mixed", byte_level().encode_now("你", False)], ["mixed", "你"]),
    ],
    ids=["text", "texts", "ids", "lists-of-ids", "mixed"],
)
def test_every_form_of_prompt(server: FakeServer, prompt: Any, texts: list[str]) -> None:
    answer = server.complete(prompt=prompt, max_tokens=3, n=2, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(texts)))
    assert [choice["text"] for choice in answer["choices"]] == [text + "Hel" for text in texts for _ in range(2)]
    sent = {request.request_id.rpartition("-")[2]: request for request in server.engine.requests}
    for index, text in enumerate(text for text in texts for _ in range(2)):
        assert list(sent[str(index)].prompt_token_ids) == byte_level().encode_now(text, False)
    num_prompt = sum(len(byte_level().encode_now(text, False)) for text in texts)
    assert answer["usage"]["prompt_tokens"] == num_prompt  # each prompt once
    assert answer["usage"]["completion_tokens"] == 3 * 2 * len(texts)


def test_logprobs_have_openais_shape(server: FakeServer) -> None:
    choice = server.complete(max_tokens=200, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert lengths == {NUM_TOKENS + 1}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert next(iter(top)) == token and top[token] == logprob
        assert len(top) in (2, 3)
    # A token's offset is that of the character in which its first byte stands.
    char_of_byte = [index for index, char in enumerate(TEXT) for _ in char.encode()]
    starts: list[int] = []
    position = 0
    for token_id in server.engine.script:
        starts.append(char_of_byte[position])
        position += len(byte_level().token_bytes(token_id))
    assert logprobs["text_offset"][:-1] == starts
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    assert logprobs["text_offset"][-1] == len(choice["text"])


def test_logprobs_0_shows_the_sampled_token_alone(server: FakeServer) -> None:
    logprobs = server.complete(max_tokens=4, logprobs=0)["choices"][0]["logprobs"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["H"], ["e"], ["l"], ["l"]]
    spelled = server.complete(max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)
    assert spelled["choices"][0]["logprobs"]["tokens"] == [f"token_id:{server.engine.script[0]}"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_reads_what_it_needs(server: FakeServer, max_tokens: int) -> None:
    """WIRE 3.3: `token_logprobs[ctxlen:-1]`, greedy where the token's float equals the largest of its top ones."""
    prompts = [byte_level().encode_now(text, False) for text in ("今天天气很好", "a 🚀", "b")]
    answer = server.complete(prompt=prompts, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True)
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + max_tokens
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for position in range(1, len(ids)):
            best = max(logprobs["top_logprobs"][position].values())
            assert (logprobs["token_logprobs"][position] == best) == (position % 2 == 0)
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == max_tokens * len(prompts)


def test_prompt_logprobs_have_vllms_shape(server: FakeServer) -> None:
    ids = byte_level().encode_now("你好 ok", False)
    choice = server.complete(prompt=ids, prompt_logprobs=1, max_tokens=1)["choices"][0]
    entries = choice["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(ids)
    for position, token_id in enumerate(ids[1:], start=1):
        own = entries[position][str(token_id)]
        assert own["decoded_token"] == byte_level().token_text(token_id)
        assert own["rank"] == 1 + position % 2
        assert len(entries[position]) == own["rank"]
        assert {entry["rank"] for entry in entries[position].values()} == set(range(1, own["rank"] + 1))


def test_echo_with_both_kinds_of_prompt_logprobs_keeps_their_counts_apart(server: FakeServer) -> None:
    choice = server.complete(prompt="Hey", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1)["choices"][0]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2, 1, 2]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [3, 3]


def test_cached_tokens_are_those_of_the_sample_that_computed_most(server: FakeServer) -> None:
    server.engine.num_cached_tokens = 2
    try:
        answer = server.complete(prompt=["abc", "def"], n=2, max_tokens=1)
    finally:
        server.engine.num_cached_tokens = 0
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert answer["usage"]["prompt_tokens"] == sum(len(byte_level().encode_now(text)) for text in ("abc", "def"))


def test_seed_is_drawn_returned_and_derived_for_samples(server: FakeServer) -> None:
    response = server.post({"prompt": ["a", "b"], "n": 3, "max_tokens": 1})
    seed = int(response.headers["headwater-seed"])
    assert response.json()["seed"] == seed and 0 <= seed < 2**53
    sent = sorted(server.engine.requests, key=lambda request: request.request_id)
    expected = [derive_seed(seed, sample) for sample in range(3)]
    assert [request.params.seed for request in sent] == expected * 2
    assert expected[0] == seed and len(set(expected)) == 3

    given = server.post({"prompt": "a", "seed": -1, "max_tokens": 1, "stream": True})
    assert given.headers["headwater-seed"] == "-1"
    assert server.engine.requests[-1].params.seed == 2**64 - 1
    other = server.post({"prompt": "a", "max_tokens": 1})
    assert other.headers["headwater-seed"] != str(seed)


def test_seed_stands_in_the_usage_chunk(server: FakeServer) -> None:
    chunks = server.stream(seed=77, max_tokens=2, stream_options={"include_usage": True})
    assert chunks[-1]["seed"] == 77 and all("seed" not in chunk for chunk in chunks[:-1])


def test_continuous_usage(server: FakeServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


def test_streams_of_several_choices_are_one_chunk_a_choice_and_step(server: FakeServer) -> None:
    chunks = server.stream(prompt=["a", "b"], n=2, max_tokens=5)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    for index in range(4):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["text"] for choice in own] == list("Hello")
        assert own[-1]["finish_reason"] == "length"


def test_null_is_not_given(server: FakeServer) -> None:
    names = ("max_tokens", "temperature", "stop", "logprobs", "n", "seed", "suffix", "user", "unheard_of")
    fields = dict.fromkeys(names)
    response = server.post({"model": None, "prompt": "a"} | fields)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 16
    assert "headwater-ignored" not in response.headers


def test_harmless_fields_are_named(server: FakeServer) -> None:
    body = {
        "prompt": "a",
        "user": "x\r\ny: z",
        "best_of": 2,
        "n": 2,
        "store": False,
        "response_format": {"type": "text"},
    }
    response = server.post(body)
    assert response.status_code == 200
    assert response.headers["headwater-ignored"] == "best_of, store, user"


def test_request_ids(server: FakeServer) -> None:
    mine = server.post({"prompt": "a", "max_tokens": 1}, **{"x-request-id": "mine.1:2-3_4"})
    assert mine.headers["x-request-id"] == "mine.1:2-3_4" and mine.json()["id"] == "cmpl-mine.1:2-3_4"
    odd = server.post({"prompt": "a", "max_tokens": 1}, **{"x-request-id": "no spaces, please"})
    assert len(odd.headers["x-request-id"]) == 32
    named = server.post({"prompt": "a", "max_tokens": 1, "request_id": "body-id"}, **{"x-request-id": "head"})
    assert named.headers["x-request-id"] == "head" and named.json()["id"] == "cmpl-body-id"
    # The engine's ids are its own: the same client id twice at once is no clash.
    assert len({request.request_id for request in server.engine.requests}) == 3


def test_truncation(server: FakeServer) -> None:
    long = "x " * 600
    whole = byte_level().encode_now(long, False)
    server.complete(prompt=long, truncate_prompt_tokens=5, max_tokens=1)
    assert list(server.engine.requests[-1].prompt_token_ids) == whole[-5:]
    server.complete(prompt=long, truncate_prompt_tokens=5, truncation_side="right", max_tokens=1)
    assert list(server.engine.requests[-1].prompt_token_ids) == whole[:5]
    server.complete(prompt=long, truncate_prompt_tokens=-1, max_tokens=20)
    assert len(server.engine.requests[-1].prompt_token_ids) == 256 - 20
    answer = server.complete(prompt="Hello you", truncate_prompt_tokens=3, echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "you"


def test_max_tokens_is_one_bound_and_the_context_another(server: FakeServer) -> None:
    prompt = byte_level().encode_now("a" * 250, False)
    room = 256 - len(prompt)
    answer = server.complete(prompt=prompt, max_tokens=256, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == room


def test_end_tokens_of_the_model_stop_a_prompt_of_their_own(server: FakeServer) -> None:
    answer = server.complete(prompt=[END], max_tokens=2, echo=True)
    assert answer["choices"][0]["text"] == "He"
    shown = server.complete(prompt=[END], max_tokens=2, echo=True, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "<|end|>He"


def test_finish_reasons_add_up_and_gauges_return_to_0() -> None:
    with fake_server() as server:
        server.complete(max_tokens=3, n=3)
        server.complete(max_tokens=200)
        server.stream(max_tokens=200, stop="世", prompt=["a", "b"])
        server.engine.fail_at = 2
        assert server.post({"prompt": "a"}).status_code == 500
        server.engine.fail_at = None
        counts = {reason: server.sample("request_success_total", finished_reason=reason) for reason in FinishReason}
        assert counts == {"length": 3, "stop": 3, "abort": 0, "error": 1}
        assert server.is_idle()
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert server.sample(gauge) == 0
        assert server.sample("prompt_tokens_total") == 3 * 2 + 2 + 2 + 1


def test_brackets_in_texts_are_no_lists(server: FakeServer) -> None:
    assert len(server.complete(prompt=["[" * 50] * 30, max_tokens=1)["choices"]) == 30


def test_what_leaves_some_token_is_taken(server: FakeServer) -> None:
    for fields in (
        {"allowed_token_ids": [45, 46], "bad_words": ["L"]},
        {"allowed_token_ids": [1, 45], "min_tokens": 1},
    ):
        assert server.complete(max_tokens=2, **fields)["choices"]
