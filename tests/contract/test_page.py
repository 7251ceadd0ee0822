"""The page as a server answers it, and `/engine`, which feeds its live view. The browser's side: tests/e2e."""

import re

from app.api.routes.page import load_files
from tests.contract.serving import FakeServer, fake_server

MAX_PAGE_BYTES = 150_000
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser")


def test_the_page_is_served_under_a_strict_policy(server: FakeServer) -> None:
    answer = server.http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert "require-trusted-types-for 'script'" in policy


def test_every_file_that_the_page_names_is_there(server: FakeServer) -> None:
    names = re.findall(r'(?:src|href)="(page/[^"]+)"', server.http.get("/").text)
    assert len(names) >= 3
    for name in names:
        answer = server.http.get(f"/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"


def test_an_unchanged_file_is_not_sent_again(server: FakeServer) -> None:
    first = server.http.get("/page/style.css")
    again = server.http.get("/page/style.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = server.http.get("/page/style.css", headers={"accept-encoding": "identity"})
    assert plain.content == first.content and plain.headers["etag"] != first.headers["etag"]


def test_no_other_path_is_served(server: FakeServer) -> None:
    for name in ("nope.js", "..%2fapp.py", "%2e%2e/app.py", "", "__init__.py"):
        assert server.http.get(f"/page/{name}").status_code == 404


def test_the_page_is_small_and_makes_no_markup_of_text() -> None:
    files = load_files()
    assert sum(len(file.content) for file in files.values()) < MAX_PAGE_BYTES
    for name, file in files.items():
        text = file.content.decode()
        assert not MARKUP.search(text), name
        assert not re.search(r"\sstyle=|\son[a-z]+=", text) or not name.endswith(".html"), name
        assert not re.search(r"https?://(?!www\.w3\.org)", text), f"{name} names another host"


def test_the_page_can_be_switched_off() -> None:
    with fake_server(page=False) as server:
        assert server.http.get("/").status_code == 404
        assert server.http.get("/page/style.css").status_code == 404
        assert server.http.get("/engine").status_code == 200


def test_engine_view(server: FakeServer) -> None:
    server.complete(max_tokens=3)
    view = server.http.get("/engine").json()
    assert (view["state"], view["generation"], view["num_running"], view["num_waiting"]) == ("ready", 1, 0, 0)
    assert view["kv"] == {"num_blocks": 64, "block_size": 16, "num_used": 0, "num_shared": 0, "num_cached": 0}
    assert view["time_to_first_token"]["count"] >= 1 and view["prefix_hit_rate"] == 0.4
    server.http.get("/metrics")  # which sees the fake engine's step
    rows = server.http.get("/engine").json()
    assert rows["steps"] and len(rows["steps"][-1]) == 11
    assert server.http.get(f"/engine?after={rows['last_step']}").json()["steps"] == []
    refused = server.http.get("/engine?after=-1")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "after"


def test_detokenize_spells_tokens(server: FakeServer) -> None:
    ids = server.post({"prompt": "a你", "return_token_strs": True}, "/tokenize").json()
    back = server.post({"tokens": ids["tokens"], "return_token_strs": True}, "/detokenize").json()
    assert back == {"prompt": "a你", "token_strs": ids["token_strs"]}
