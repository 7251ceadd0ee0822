"""Streams that go on on another server, cut behind every event, by every way; and cursors that are refused."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from app.api.admission import AdmissionLimits
from app.api.cursor import Cursor
from app.api.deps import ApiLimits
from app.api.kept import KeptStreams
from app.api.key_ring import KeyRing
from app.text import ChatTemplate
from app.text.reasoning import FORMS
from tests.contract.serving import MODEL, FakeServer, fake_server, wait_until
from tests.contract.streams import Body, Event, events_of, parse_events, resumed, said, token_ids_of
from tests.contract.test_tools import CALLS, CLOCK, SOURCE, WEATHER
from tests.text_tokenizers import byte_level

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "你好 🌍"}]
TEMPLATE = ChatTemplate({"default": SOURCE}, special_tokens={"bos_token": "<|start|>", "eos_token": "<|end|>"})
TEXT = "Hi 你好 🌍 é. \nAnd the end of it"
USAGE = {"include_usage": True}
KEYS = ("a-key-of-one-client-1", "a-key-of-another-one-2")

CASES: dict[str, tuple[str, Body]] = {
    "plain": (COMPLETIONS, {}),
    "seeded, with usage": (COMPLETIONS, {"seed": -7, "stream_options": USAGE}),
    "three choices": (COMPLETIONS, {"n": 3, "max_tokens": 9, "stream_options": USAGE}),
    "two prompts": (COMPLETIONS, {"prompt": ["Hi", "你好"], "n": 2, "max_tokens": 5, "stream_options": USAGE}),
    "log-probabilities": (COMPLETIONS, {"logprobs": 2, "max_tokens": 14}),
    "echo and log-probabilities": (COMPLETIONS, {"logprobs": 1, "echo": True, "max_tokens": 14}),
    "a stop string": (COMPLETIONS, {"stop": ["And the"], "stream_options": USAGE}),
    "a stop string within min_tokens": (COMPLETIONS, {"stop": ["好", "nd t"], "min_tokens": 9}),
    "a stop string that is shown": (COMPLETIONS, {"stop": "end", "include_stop_str_in_output": True}),
    "its own counts": (COMPLETIONS, {"max_tokens": 9, "stream_options": {"continuous_usage_stats": True}}),
    "token ids": (COMPLETIONS, {"return_token_ids": True, "echo": True, "max_tokens": 14}),
    "no tokens at all": (COMPLETIONS, {"max_tokens": 0, "echo": True}),
    "chat": (CHAT, {"stream_options": USAGE}),
    "two chats": (CHAT, {"n": 2, "max_tokens": 9, "stream_options": USAGE}),
    "chat with log-probabilities": (CHAT, {"logprobs": True, "top_logprobs": 2, "max_tokens": 14}),
    "chat with token ids": (CHAT, {"return_token_ids": True, "max_tokens": 14}),
    "tools": (CHAT, {"tools": [WEATHER, CLOCK], "stream_options": USAGE}),
    "reasoning": (CHAT, {"stream_options": USAGE}),
    "reasoning, two of them, then tools": (CHAT, {"n": 2, "tools": [WEATHER, CLOCK], "stream_options": USAGE}),
    "reasoning that is not shown": (CHAT, {"include_reasoning": False, "stop": "end"}),
    "tools with token ids": (CHAT, {"tools": [WEATHER, CLOCK], "return_token_ids": True}),
}


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    """Two that share nothing but what they serve. The second finds other prefixes in its cache."""
    options: dict[str, Any] = {"chat_template": TEMPLATE, "max_model_len": 1024, "reasoning": FORMS["qwen3"]}
    with fake_server(**options) as first, fake_server(**options) as second:
        yield first, second


def fresh(server: FakeServer) -> Iterator[FakeServer]:
    """The server as every test finds it, checked to be idle afterwards."""
    server.engine.tokens_per_output = 1
    server.engine.num_cached_tokens = 0
    say(server, "plain")
    yield server
    wait_until(server.is_idle)


@pytest.fixture
def first(servers: tuple[FakeServer, FakeServer]) -> Iterator[FakeServer]:
    yield from fresh(servers[0])


@pytest.fixture
def second(servers: tuple[FakeServer, FakeServer]) -> Iterator[FakeServer]:
    yield from fresh(servers[1])


def body_of(case: str) -> tuple[str, Body]:
    path, fields = CASES[case]
    body: Body = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    options = fields.get("stream_options", {}) | {"resumable": True}
    return path, {"max_tokens": 200} | body | fields | {"stream": True, "stream_options": options}


def say(server: FakeServer, case: str) -> None:
    text = "<think>\nSo 你 <i>say</i>.\n</think>\n\n" if "reasoning" in case else ""
    text += CALLS if "tools" in case else TEXT
    server.engine.script = tuple(byte_level().encode_now(text, False))


@pytest.mark.parametrize(("way", "tokens_per_output"), [("decode", 1), ("decode", 3), ("tokens", 1), ("journal", 3)])
@pytest.mark.parametrize("case", CASES)
def test_cut_behind_every_event_it_goes_on_without_a_byte_of_difference(
    first: FakeServer, second: FakeServer, case: str, way: str, tokens_per_output: int
) -> None:
    path, body = body_of(case)
    if way == "tokens":
        body["return_token_ids"] = True
    for server in (first, second):
        say(server, case)
    first.engine.tokens_per_output = tokens_per_output
    events = events_of(first.post(body, path))
    whole = said(events)
    assert all(event.id for event in events) and not whole.errors
    assert len({event.id for event in events[:-1]}) == len(events) - 1
    second.engine.tokens_per_output = 2
    # Of a choice that the first server had not begun, the second one says what its own cache saved.
    second.engine.num_cached_tokens = 0 if case == "two prompts" else 3
    other = first if way == "journal" else second
    for count in range(1, len(events), 1 if len(events) < 80 else 3):
        sent = events[:count]
        token_ids = token_ids_of(sent, len(whole.choices)) if way == "tokens" else None
        rest = events_of(resumed(other, body, path, cursor=sent[-1].id, token_ids=token_ids))
        assert said(sent + rest) == whole, f"cut behind event {count}"
    response = resumed(other, body, path, cursor=events[-1].id)
    assert [event.data for event in events_of(response)] == ["[DONE]"]
    assert response.headers["headwater-resumed"] == "journal"


def test_cut_again_and_again_it_goes_on_from_where_the_last_cut_was(first: FakeServer, second: FakeServer) -> None:
    path, body = body_of("two chats")
    events = events_of(first.post(body, path))
    sent = events[:1]
    servers = [first, second]
    while sent[-1].data != "[DONE]":
        servers.reverse()
        sent.append(events_of(resumed(servers[0], body, path, cursor=sent[-1].id))[0])
    assert said(sent) == said(events)


def test_openai_client_reads_a_stream_with_cursors_and_goes_on_with_one(first: FakeServer) -> None:
    say(first, "plain")
    path, body = body_of("chat")
    events = events_of(first.post(body, path))
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 200, "stream": True}
    ask["stream_options"] = body["stream_options"]
    for skipped in (0, 5):
        headers = {"Last-Event-ID": events[skipped - 1].id} if skipped else {}
        stream = first.client.chat.completions.create(**ask, extra_headers=headers)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == said(events[skipped:]).choices[0].text


def test_a_drawn_seed_goes_with_the_cursor(first: FakeServer, second: FakeServer) -> None:
    path, body = body_of("plain")
    response = first.post(body, path)
    again = resumed(second, body, path, cursor=events_of(response)[3].id)
    assert again.headers["headwater-seed"] == response.headers["headwater-seed"]
    assert again.headers["headwater-resumed"] == "decode" and again.headers["headwater-resume"] == "exact"


@pytest.mark.parametrize("way", ["decode", "tokens", "journal"])
def test_where_the_tokens_came_from_is_told_and_counted(first: FakeServer, second: FakeServer, way: str) -> None:
    path, body = body_of("token ids")
    events = events_of(first.post(body, path))
    server = first if way == "journal" else second
    before = server.sample("streams_resumed_total", source=way)
    server.engine.requests.clear()
    ids = token_ids_of(events[:4], 1)
    response = resumed(server, body, path, cursor=events[3].id, token_ids=ids if way == "tokens" else None)
    assert response.headers["headwater-resumed"] == way
    assert server.sample("streams_resumed_total", source=way) == before + 1
    handed_over = [request.output_token_ids for request in server.engine.requests]
    assert handed_over == {"decode": [()], "tokens": [tuple(ids[0])], "journal": []}[way]


def leave_after(server: FakeServer, body: Body, path: str, *, count: int, **headers: str) -> list[Event]:
    """Begin a stream, close the connection when the engine has made `count` tokens, and let the server notice."""
    server.engine.hold_at = count
    raw = ""
    with server.http.stream("POST", path, json=body, headers=headers) as response:
        for text in response.iter_text():
            raw += text
            if raw.count("\n\n") >= count:
                break
    wait_until(server.is_idle)
    server.engine.hold_at = None
    return parse_events(raw)


def test_a_stream_that_its_client_left_goes_on_from_the_journal(first: FakeServer) -> None:
    say(first, "plain")
    path, body = body_of("plain")
    whole = said(events_of(first.post(body | {"seed": 1}, path)))
    events = leave_after(first, body | {"seed": 1}, path, count=6)[:4]
    first.engine.requests.clear()
    response = resumed(first, body | {"seed": 1}, path, cursor=events[-1].id)
    assert response.headers["headwater-resumed"] == "journal"
    assert first.engine.requests[0].output_token_ids == first.engine.script[:6]
    rest = events_of(response)
    assert said(events + rest).choices == whole.choices


def test_what_is_kept_is_given_to_its_owner_alone() -> None:
    keys = KeyRing(keys=KEYS)
    path, body = body_of("plain")
    own, other = ({"authorization": f"Bearer {key}"} for key in KEYS)
    with fake_server(keys=keys) as server:
        events = leave_after(server, body, path, count=6, **own)
        cursor = {"last-event-id": events[2].id}
        assert server.post(body, path, **cursor).status_code == 401
        taken = server.post(body, path, **cursor, **other)
        assert taken.headers["headwater-resumed"] == "decode"
        salted = server.post(body | {"cache_salt": "x"}, path, **cursor, **own)
        assert salted.headers["headwater-resumed"] == "decode"
        mine = server.post(body, path, **cursor, **own)
        assert mine.headers["headwater-resumed"] == "journal"
        assert said(events_of(mine)).choices == said(events_of(taken)).choices


def test_nothing_is_kept_where_the_window_is_nothing() -> None:
    path, body = body_of("plain")
    with fake_server(kept=KeptStreams(window=0)) as server:
        events = leave_after(server, body, path, count=4)
        response = resumed(server, body, path, cursor=events[1].id)
        assert response.headers["headwater-resumed"] == "decode"


@pytest.mark.parametrize("case", ["log-probabilities", "chat with log-probabilities", "plain"])
def test_what_was_too_much_to_keep_is_drawn_again(first: FakeServer, case: str) -> None:
    path, body = body_of(case)
    body |= {"max_tokens": 40, "ignore_eos": True}
    say(first, case)
    events = events_of(first.post(body, path))
    with fake_server(kept=KeptStreams(max_stream_bytes=3000), chat_template=TEMPLATE, max_model_len=1024) as server:
        say(server, case)
        own = events_of(server.post(body | {"request_id": "a"}, path))
        for count, way in ((3, "decode"), (39, "journal")):
            response = resumed(server, body | {"request_id": "a"}, path, cursor=own[count - 1].id)
            assert response.headers["headwater-resumed"] == ("journal" if case == "plain" else way)
            assert said(own[:count] + events_of(response)).choices == said(events).choices


def test_a_stream_that_does_not_ask_for_it_has_no_cursors(first: FakeServer) -> None:
    events = events_of(first.post({"prompt": "Hi", "stream": True}))
    assert not any(event.id for event in events)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prompt": "Ho"}, "prompt_differs"),
        ({"prompt": ["Hi", "Hi"]}, "prompt_differs"),
        ({"temperature": 0.3}, "parameters_differ"),
        ({"stop": "x"}, "parameters_differ"),
        ({"logprobs": 1}, "parameters_differ"),
        ({"n": 2}, "parameters_differ"),
        ({"return_token_ids": True}, "parameters_differ"),
        ({"seed": 4}, "seed_differs"),
    ],
)
def test_another_request_is_a_conflict_that_names_what_differs(
    first: FakeServer, second: FakeServer, changes: Body, code: str
) -> None:
    path, body = body_of("plain")
    cursor = events_of(first.post(body | {"seed": 3}, path))[2].id
    for server in (first, second):
        refused = resumed(server, body | {"seed": 3} | changes, path, cursor=cursor)
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert (error["code"], error["param"], error["type"]) == (code, "Last-Event-ID", "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": USER, "max_tokens": 5, "stream": True}),
        ("/v1/responses", {"input": "Hi", "stream": True}),
        ("/v1/completions", {"prompt": "Hi", "stream": True}),
        ("/v1/completions", {"prompt": "Hi"}),
    ],
)
def test_what_cannot_go_on_says_so(first: FakeServer, path: str, body: Body) -> None:
    cursor = events_of(first.post(body_of("plain")[1], COMPLETIONS))[2].id
    refused = first.post(body, path, **{"last-event-id": cursor})
    assert refused.status_code == 400 and "resumable" in refused.text
    assert first.post(body, path, **{"last-event-id": ""}).status_code == 200


def test_a_long_stream_goes_on_in_parts(first: FakeServer, second: FakeServer) -> None:
    """More tokens than are made text of in one go."""
    path, body = body_of("token ids")
    body |= {"max_tokens": 400, "ignore_eos": True, "logprobs": 1}
    for server in (first, second):
        say(server, "plain")
    whole = events_of(first.post(body, path))
    for server, count in ((first, 3), (first, 300), (second, 300)):
        ids = token_ids_of(whole[:count], 1)
        rest = events_of(resumed(server, body, path, cursor=whole[count - 1].id, token_ids=ids))
        assert said(whole[:count] + rest) == said(whole)
        assert max(len(event.chunk["choices"][0]["token_ids"]) for event in rest[:-1]) <= 64


def test_another_route_is_another_request(first: FakeServer) -> None:
    path, body = body_of("plain")
    cursor = events_of(first.post(body, path))[2].id
    chat = body_of("chat")
    assert resumed(first, chat[1], chat[0], cursor=cursor).status_code == 409


def test_another_fingerprint_is_a_conflict(first: FakeServer, second: FakeServer) -> None:
    path, body = body_of("plain")
    cursor = events_of(first.post(body, path))[2].id
    limits = second.engine.limits_when_ready
    second.engine.limits_when_ready = msgspec.structs.replace(limits, fingerprint="fp-other")
    refused = resumed(second, body, path, cursor=cursor)
    second.engine.limits_when_ready = limits
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "fingerprint_differs" and "fp-other" in refused.text


@pytest.mark.parametrize("cursor", ["x", "1", "1AAAA", "1" + "A" * 5000, "2abc", "1!!", "1ä"])
def test_what_is_no_cursor_is_refused(first: FakeServer, cursor: str) -> None:
    path, body = body_of("plain")
    response = first.http.post(path, json=body, headers={b"last-event-id": cursor.encode("latin-1")})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_cursor"


@pytest.mark.parametrize(
    "forged",
    [
        {"position": 0, "num_cached_tokens": 2**31 - 1},
        {"num_cached_tokens": 3},
        {"num_reasoning_tokens": 4},
        {"position": 201, "is_finished": True},
        {"position": 201},
    ],
)
def test_a_cursor_of_what_cannot_be_is_refused(first: FakeServer, second: FakeServer, forged: dict[str, int]) -> None:
    path, body = body_of("plain")
    cursor = Cursor.read(events_of(first.post(body, path))[2].id)
    assert cursor.choices[0] is not None and cursor.choices[0].position == 3
    choice = msgspec.structs.replace(cursor.choices[0], **forged)
    refused = resumed(second, body, path, cursor=msgspec.structs.replace(cursor, choices=(choice,)).write())
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_cursor", "Last-Event-ID")


@pytest.mark.parametrize("way", ["decode", "tokens", "journal"])
def test_what_the_cache_saved_is_counted_where_it_did(first: FakeServer, second: FakeServer, way: str) -> None:
    """The usage tells what the first server's cache saved, the metrics what this one's did."""
    path, body = body_of("token ids")
    body["stream_options"] |= USAGE
    first.engine.num_cached_tokens, second.engine.num_cached_tokens = 2, 1
    events = events_of(first.post(body, path))
    server = first if way == "journal" else second
    before = server.sample("prompt_tokens_cached_total")
    ids = token_ids_of(events[:4], 1) if way == "tokens" else None
    response = resumed(server, body, path, cursor=events[3].id, token_ids=ids)
    assert response.headers["headwater-resumed"] == way
    [usage] = said(events_of(response)).usage
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert server.sample("prompt_tokens_cached_total") == before + (0 if way == "journal" else 1)


@pytest.mark.parametrize(
    ("options", "token_ids", "param"),
    [
        ({}, [], "Last-Event-ID"),
        ({"resumable": True}, [[5]], "stream_options.resume_token_ids"),
        ({"resumable": True}, [[5, 10**6, 5]], "stream_options.resume_token_ids"),
        ({"resumable": True}, [[-1]], "stream_options.resume_token_ids[0][0]"),
        ({"resumable": False}, [[5]], "stream_options.resume_token_ids"),
    ],
)
def test_a_resumption_that_cannot_be_is_refused(first: FakeServer, options: Body, token_ids: Any, param: str) -> None:
    path, body = body_of("plain")
    cursor = events_of(first.post(body, path))[2].id
    options = options | ({"resume_token_ids": token_ids} if token_ids else {})
    response = first.post(body | {"stream_options": options}, path, **{"last-event-id": cursor})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_token_ids_without_a_cursor_and_too_many_choices_are_refused(first: FakeServer) -> None:
    path, body = body_of("plain")
    options = {"resumable": True, "resume_token_ids": [[1]]}
    assert first.post(body | {"stream_options": options}, path).status_code == 400
    many = first.post(body | {"n": 65, "max_tokens": 1}, path)
    assert many.status_code == 400 and many.json()["error"]["param"] == "stream_options.resumable"


def test_other_words_are_never_sent(first: FakeServer, second: FakeServer) -> None:
    """A server that says something else than the client has ends the stream, whatever the tokens are."""
    path, body = body_of("token ids")
    for server in (first, second):
        say(server, "plain")
    events = events_of(first.post(body, path))[:6]
    ids = token_ids_of(events, 1)
    second.engine.script = tuple(byte_level().encode_now("Ho 你好 🌍 what else", False))
    diverged = resumed(second, body, path, cursor=events[-1].id)
    assert diverged.status_code == 500 and diverged.json()["error"]["code"] == "resume_diverged"
    ids[0][0] += 1
    refused = resumed(second, body, path, cursor=events[-1].id, token_ids=ids)
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "text_differs"
    second.engine.script = second.engine.script[:2]
    assert resumed(second, body, path, cursor=events[-1].id).status_code == 500


def test_once_the_response_has_begun_other_words_are_an_error_event(first: FakeServer) -> None:
    path, body = body_of("plain")
    say(first, "plain")
    events = events_of(first.post(body, path))[:6]
    with fake_server(text="Ho ho ho ho ho", limits=ApiLimits(keep_alive_interval=0.01)) as slow:
        slow.engine.hold_at = 3
        raw = ""
        with slow.http.stream("POST", path, json=body, headers={"last-event-id": events[-1].id}) as response:
            for text in response.iter_text():
                raw += text
                slow.engine.hold_at = None
        assert raw.startswith(": keep-alive")
        whole = said(parse_events(raw))
        assert whole.errors[0]["code"] == "resume_diverged" and not whole.choices and whole.num_ends == 1


def test_where_rows_are_not_independent_it_is_marked(first: FakeServer, second: FakeServer) -> None:
    path, body = body_of("plain")
    limits = second.engine.limits_when_ready
    say(first, "plain")
    say(second, "plain")
    events = events_of(first.post(body, path))[:6]
    second.engine.limits_when_ready = msgspec.structs.replace(limits, row_independent=False)
    response = resumed(second, body, path, cursor=events[-1].id)
    second.engine.limits_when_ready = limits
    assert response.headers["headwater-resume"] == "approximate"
    assert response.text.startswith(": another engine goes on with this; on this tier the text may differ")


def test_the_log_says_that_a_stream_went_on(second: FakeServer, first: FakeServer, caplog: Any) -> None:
    path, body = body_of("plain")
    events = events_of(first.post(body, path))
    with caplog.at_level("INFO", logger="headwater"):
        request_id = resumed(second, body, path, cursor=events[3].id).headers["x-request-id"]
        wait_until(lambda: any(getattr(one, "facts", {}).get("request_id") == request_id for one in caplog.records))
    [facts] = [one.facts for one in caplog.records if getattr(one, "facts", {}).get("request_id") == request_id]
    assert facts["resumed"] == "decode"


def test_a_resumption_is_admitted_like_any_request() -> None:
    path, body = body_of("plain")
    limits = ApiLimits(keep_alive_interval=0.01)
    with fake_server(admission=AdmissionLimits(max_live_sequences=1), limits=limits) as server:
        events = leave_after(server, body, path, count=4)
        server.engine.hold_at = 0
        with server.http.stream("POST", path, json={"prompt": "x", "max_tokens": 1, "stream": True}) as other:
            refused = resumed(server, body, path, cursor=events[-1].id)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            server.engine.hold_at = None
            other.read()
        wait_until(server.is_idle)
        assert resumed(server, body, path, cursor=events[-1].id).headers["headwater-resumed"] == "journal"
