"""API keys: which routes need one, how it may come, what is kept of it, and that a changed file takes effect."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from app.access import make_keys, make_metrics_keys
from app.api.key_ring import KeyRing
from app.core.errors import ConfigurationError
from app.serve import _check_exposure
from app.settings import load_settings
from tests.contract.serving import MODEL, TEXT, FakeServer, fake_server, wait_until

ALICE = "alice-0123456789abcdef"
BOB = "bob-0123456789abcdef"
SCRAPER = "scraper-0123456789abcdef"
OPEN = {"/health", "/ready", "/", "/page/main.js"}
CLOSED = [
    *(("GET", path) for path in ("/v1/models", f"/v1/models/{MODEL}", "/version", "/metrics", "/tokenizer_info")),
    *(("GET", path) for path in ("/engine", "/openapi.json", "/docs", "/no-such-route", "/health/x")),
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize")),
    ("POST", "/detokenize"),
]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may ask\n\nalice:{ALICE}\n  {BOB}  \n")
    with fake_server(keys=KeyRing(file=file), metrics_keys=KeyRing(keys=[SCRAPER])) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_other_route_needs_a_key(locked: FakeServer, method: str, path: str) -> None:
    for headers in ({}, bearer("wrong-0123456789abcdef"), {"x-api-key": ALICE[:-1]}, {"authorization": f"Basic {BOB}"}):
        response = locked.http.request(method, path, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert error["type"] == "authentication_error" and error["param"] is None
        assert error["code"] in ("missing_api_key", "invalid_api_key") and "x-request-id" in response.headers
    assert locked.http.request(method, path, headers=bearer(BOB)).status_code != 401
    assert locked.engine.requests == []


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_and_the_page_are_open(locked: FakeServer, path: str) -> None:
    assert locked.http.get(path).status_code == 200


def test_a_scraper_reads_metrics_and_nothing_else(locked: FakeServer) -> None:
    assert locked.http.get("/metrics", headers=bearer(SCRAPER)).status_code == 200
    assert locked.http.get("/metrics", headers=bearer(ALICE)).status_code == 200
    assert locked.http.get("/v1/models", headers=bearer(SCRAPER)).status_code == 401


def test_a_key_for_metrics_alone_leaves_the_rest_open() -> None:
    with fake_server(metrics_keys=KeyRing(keys=[SCRAPER])) as server:
        assert server.http.get("/metrics").status_code == 401
        assert server.complete(max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_openai_client_sends_its_key(locked: FakeServer) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=ALICE, max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt="Hi", max_tokens=200).choices[0].text == TEXT
    with pytest.raises(openai.AuthenticationError) as refused:
        locked.client.completions.create(model=MODEL, prompt="Hi")
    assert refused.value.code == "invalid_api_key"
    assert locked.post({"prompt": "Hi"}, **{"x-api-key": BOB}).status_code == 200
    assert locked.post({"prompt": "Hi"}, authorization=f"bearer  {BOB}").status_code == 200


def test_a_refused_body_is_not_read(locked: FakeServer) -> None:
    """A large one leaves the connection usable."""
    for _ in range(2):
        assert locked.post({"prompt": "x" * 1_000_000}).status_code == 401
    assert locked.http.get("/health").status_code == 200


def test_prefixes_are_shared_within_one_key_only(locked: FakeServer) -> None:
    locked.engine.requests.clear()
    bodies: list[dict[str, Any]] = [
        {"prompt": "Hi", "max_tokens": 1},
        {"prompt": "Hi", "max_tokens": 1, "cache_salt": "s"},
    ]
    for key in (ALICE, BOB):
        for body in bodies:
            assert locked.post(body, **bearer(key)).status_code == 200
    salts = [request.cache_salt for request in locked.engine.requests]
    assert len(set(salts)) == 4 and all(salt.endswith(("/", "/s")) for salt in salts)
    assert not any(key in salt for key in (ALICE, BOB) for salt in salts)


def test_the_log_names_the_key_by_its_hash(locked: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    def logged() -> list[dict[str, Any]]:
        # Of this test's requests: the line of one before may come late.
        facts = [getattr(record, "facts", {}) for record in caplog.records if record.name == "headwater.request"]
        return [one for one in facts if one["request_id"].startswith("logged-")]

    with caplog.at_level(logging.INFO, logger="headwater.request"):
        # A line is written when its answer is out already.
        for number, key in enumerate((ALICE, "wrong-0123456789abcdef"), start=1):
            locked.post({"prompt": "Hi", "max_tokens": 1}, **bearer(key), **{"x-request-id": f"logged-{number}"})
            wait_until(lambda number=number: len(logged()) == number)  # type: ignore[misc]
    facts = logged()
    assert [one["status"] for one in facts] == [200, 401]
    assert len(str(facts[0]["key_id"])) == 12 and facts[0]["key_name"] == "alice"
    assert facts[1]["key_id"] is None and facts[1]["error"] == "invalid_api_key"
    assert [one["route"] for one in facts] == ["/v1/completions"] * 2
    text = json.dumps([str(one) for one in facts])
    assert ALICE not in text and "wrong-" not in text


def test_a_changed_file_takes_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.write_text(f"{ALICE}\n")
    ring = KeyRing(file=file, clock=lambda: now[0])
    assert ring.find(ALICE) is not None and ring.find(BOB) is None
    file.write_text(f"bob:{BOB}\n")
    assert ring.find(BOB) is None, "looked at once a second at most"
    now[0] = 1.5
    found = ring.find(BOB)
    assert found is not None and found.name == "bob" and ring.find(ALICE) is None
    now[0] = 3
    file.write_text("short\n")
    assert ring.find(BOB) is not None, "what cannot be read changes nothing"
    assert "short" not in caplog.text and "stay as they were" in caplog.text
    now[0] = 5
    file.unlink()
    assert ring.find(BOB) is not None
    now[0] = 7
    for blank in ("", " \n\n"):
        caplog.clear()
        file.write_text(blank)
        assert ring.find(BOB) is not None, "a file that is being written locks nobody out"
        assert [record.levelname for record in caplog.records] == ["ERROR"] and "is empty" in caplog.text
        now[0] += 2
    caplog.clear()
    file.write_text("# nobody\n")
    assert ring.find(BOB) is None, "comments alone let nobody in"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_same_key_has_the_same_id_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE}\n")
    ids = {ring.find(ALICE).id for ring in (KeyRing(file=file), KeyRing(keys=[ALICE]))}  # type: ignore[union-attr]
    assert len(ids) == 1


@pytest.mark.parametrize("text", ["", "# no key\n", "short\n", "a key with spaces in it\n", "имя-ключа-0123456789\n"])
def test_an_unfit_file_ends_the_start_without_showing_the_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        KeyRing(file=file)
    assert str(file) in str(refused.value) and (not text.strip() or text.strip() not in str(refused.value))
    with pytest.raises(ConfigurationError, match="nowhere"):
        KeyRing(file=tmp_path / "nowhere")


def test_a_name_that_is_none_is_told_from_a_key_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("naïve:" + "c" * 24 + "\n")
    with pytest.raises(ConfigurationError, match="name in front"):
        KeyRing(file=file)


def test_keys_come_by_file_or_variable_and_never_by_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(ALICE)
    assert make_keys(load_settings()) is None
    monkeypatch.setenv("HEADWATER_API_KEY", BOB)
    ring = make_keys(load_settings(api_key_file=str(file)))
    assert ring is not None and ring.find(ALICE) is not None and ring.find(BOB) is not None
    with pytest.raises(ConfigurationError):
        load_settings(api_key=BOB)


def test_one_warning_beyond_loopback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        _check_exposure(load_settings(host=host))
    assert capsys.readouterr().err == ""
    _check_exposure(load_settings(host="0.0.0.0"))
    assert capsys.readouterr().err.count("--api-key-file") == 1
    monkeypatch.setenv("HEADWATER_API_KEY", BOB)
    _check_exposure(load_settings(host="0.0.0.0"))
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigurationError, match="need each other"):
        _check_exposure(load_settings(ssl_certfile="x"))
    with pytest.raises(ConfigurationError, match="nowhere"):
        _check_exposure(load_settings(ssl_certfile=str(tmp_path / "nowhere"), ssl_keyfile="x"))


def test_browsers_of_other_origins_are_let_in_by_name_only() -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with fake_server(allowed_origins=("https://a.example",), keys=KeyRing(keys=[ALICE])) as server:
        answer = server.http.options("/v1/completions", headers=preflight)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        other = server.http.options("/v1/completions", headers=preflight | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = server.post({"prompt": "Hi"}, origin="https://a.example")
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    with fake_server() as server:
        assert server.http.options("/v1/completions", headers=preflight).status_code == 405
        answered = server.post({"prompt": "Hi"}, origin="https://a.example")
        assert "access-control-allow-origin" not in answered.headers


def test_the_key_of_the_variable_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_API_KEY", "team:0123456789abcdef")
    ring = make_keys(load_settings())
    assert ring is not None and ring.find("0123456789abcdef") is None
    found = ring.find("team:0123456789abcdef")
    assert found is not None and found.name is None


def test_weight_and_concurrency_stand_behind_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE} weight=2.5\tconcurrency=2\n{BOB}\n")
    with fake_server(keys=KeyRing(file=file)) as server:
        for key in (ALICE, BOB):
            assert server.post({"prompt": "Hi", "max_tokens": 3}, **bearer(key)).status_code == 200
        alice, bob = server.engine.requests
        assert (alice.weight, bob.weight) == (2.5, 1.0)
        assert alice.tenant != bob.tenant and "" not in (alice.tenant, bob.tenant)
        assert ALICE not in alice.tenant
        # Her sequences are two at most, whatever others do.
        refused = server.post({"prompt": "Hi", "n": 3}, **bearer(ALICE))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
        assert "this API key" in refused.json()["error"]["message"]
        server.engine.hold_at = 1
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "Hi", "n": 2, "stream": True}, headers=bearer(ALICE)
        ):
            wait_until(lambda: len(server.engine.live) == 2)
            refused = server.post({"prompt": "Hi"}, **bearer(ALICE))
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            server.engine.hold_at = None
            assert server.post({"prompt": "Hi", "max_tokens": 1}, **bearer(BOB)).status_code == 200
        wait_until(server.is_idle)

        def of_alice(stem: str) -> float | None:
            labels = {"model_name": MODEL, "key_id": alice.tenant}
            return server.context.metrics.registry.get_sample_value(f"headwater_key_{stem}", labels)

        assert of_alice("rejections_total") == 1 and of_alice("live_sequences") == 0
        assert (of_alice("generation_tokens_total") or 0) >= 3 and (of_alice("prompt_tokens_total") or 0) >= 2
        text = server.http.get("/metrics", headers=bearer(BOB)).text
        assert ALICE not in text and BOB not in text


@pytest.mark.parametrize("option", ["weight=0", "weight=-1", "weight=nan", "concurrency=0", "concurrency=x", "more"])
def test_an_option_that_is_not_understood_ends_the_start(tmp_path: Path, option: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE} {option}\n")
    with pytest.raises(ConfigurationError) as caught:
        KeyRing(file=file)
    assert "line 1" in str(caught.value) and ALICE not in str(caught.value) and option not in str(caught.value)


def test_a_null_device_is_no_scrape_key() -> None:
    assert make_metrics_keys(load_settings(metrics_key_file="/dev/null")) is None


@pytest.mark.parametrize(
    ("options", "asked", "given", "ignored"),
    [
        ("", -7, -7, None),
        (" priority=0", -7, 0, "priority"),
        (" priority=0", 7, 7, None),
        (" priority=-5", -7, -5, "priority"),
        (" priority=-5 weight=2", -5, -5, None),
        (" priority=3", 0, 3, "priority"),
    ],
)
def test_a_priority_is_held_to_what_the_key_allows(
    tmp_path: Path, options: str, asked: int, given: int, ignored: str | None
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE}{options}\n", encoding="utf-8")
    with fake_server(keys=KeyRing(file=file)) as server:
        response = server.post({"prompt": "a", "priority": asked}, authorization=f"Bearer {ALICE}")
        assert response.status_code == 200
        assert server.engine.requests[0].priority == given
        assert response.headers.get("headwater-ignored") == ignored


def test_without_keys_a_priority_is_as_asked() -> None:
    with fake_server() as server:
        assert server.post({"prompt": "a", "priority": -7}).status_code == 200
        assert server.engine.requests[0].priority == -7


def test_a_priority_that_is_none_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ALICE} priority=high\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="priority=0"):
        KeyRing(file=file)
