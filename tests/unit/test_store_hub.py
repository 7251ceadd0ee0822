"""Fetching from a hub, against a fake one on loopback."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.core.errors import ConfigurationError
from app.store import ModelFolder, resolve
from app.store.catalog import HubSource
from app.store.hub_api import Hub, HubSettings, RemoteFile
from app.store.hub_source import fetch_repository
from tests.fake_hub import COMMIT, FakeHub
from tests.store_models import model_files, write_folder

REPOSITORY = "someone/small-model"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    with FakeHub(REPOSITORY, model_files()) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
        yield fake


def fetch(model: str = REPOSITORY, report: Callable[[str], None] = lambda line: None) -> ModelFolder:
    return resolve(model, report=report)


def no_wait(seconds: float) -> None:
    """Waits nothing."""


def test_a_repository_is_fetched_once_and_verified(hub: FakeHub, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = fetch(report=lines.append)
    assert (folder.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert (folder.name, folder.revision, folder.licence) == (REPOSITORY, COMMIT, "apache-2.0")
    assert folder.max_model_len == 128
    assert any("licence" in line and "apache-2.0" in line for line in lines)
    num_requests = len(hub.seen)
    assert fetch() == folder
    assert len(hub.seen) == num_requests
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def test_only_what_serving_reads_is_fetched(hub: FakeHub) -> None:
    hub.files |= {
        "pytorch_model.bin": b"pickle",
        "modeling_custom.py": b"raise SystemExit",
        "README.md": b"text",
        "onnx/model.safetensors": b"other",
        "consolidated.safetensors": b"the same weights once more",
        "chat_template.jinja": b"{{ messages }}",
    }
    folder = fetch()
    names = {path.name for path in folder.path.iterdir()}
    assert names == {*model_files(), "chat_template.jinja", "headwater.json"}
    assert (folder.path / "chat_template.jinja").read_bytes() == b"{{ messages }}"


def test_a_broken_download_goes_on_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after[WEIGHTS] = [1000, 500]
    target = tmp_path / WEIGHTS
    content = hub.files[WEIGHTS]
    arrived: list[int] = []
    with Hub(HubSettings.from_environment(), sleep=no_wait) as client:
        (file,) = [file for file in client.revision(REPOSITORY, "main").files if file.path == WEIGHTS]
        client.download(REPOSITORY, COMMIT, file, target, progress=arrived.append)
    assert target.read_bytes() == content
    assert sum(arrived) == len(content)
    assert [seen.range for seen in hub.requests_for(WEIGHTS)] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_download_resumes_in_the_next_run(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.store.hub_api._ATTEMPTS", 1)
    hub.break_after[WEIGHTS] = [1000]
    with pytest.raises(ConfigurationError, match="What arrived is kept"):
        fetch()
    folder = fetch()
    assert (folder.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert [seen.range for seen in hub.requests_for(WEIGHTS)] == [None, "bytes=1000-"]
    assert len(hub.requests_for("tokenizer.json")) == 1


def test_a_hub_that_ignores_ranges_is_read_from_the_start(hub: FakeHub, tmp_path: Path) -> None:
    hub.ignores_range = True
    hub.break_after[WEIGHTS] = [1000]
    target, arrived = tmp_path / WEIGHTS, list[int]()
    file = RemoteFile(WEIGHTS, len(hub.files[WEIGHTS]), None)
    with Hub(HubSettings.from_environment(), sleep=no_wait) as client:
        client.download(REPOSITORY, COMMIT, file, target, progress=arrived.append)
    assert target.read_bytes() == hub.files[WEIGHTS]
    assert sum(arrived) == file.size


def test_a_wrong_hash_is_refused_and_nothing_is_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.announced_sha256[WEIGHTS] = "0" * 64
    with pytest.raises(ConfigurationError, match=r"model\.safetensors.*damaged.*deleted"):
        fetch()
    assert not list((tmp_path / "cache").rglob("*safetensors*"))
    del hub.announced_sha256[WEIGHTS]
    assert fetch().num_bytes == len(hub.files[WEIGHTS])


def test_a_wrong_small_file_is_refused_too(hub: FakeHub) -> None:
    hub.announced_blob_id["tokenizer.json"] = "0" * 40
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json.*damaged"):
        fetch()


def test_no_token_and_a_wrong_token_name_hf_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret-token"
    with pytest.raises(ConfigurationError, match=r"401.*no HF_TOKEN is set"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "wrong-token")
    with pytest.raises(ConfigurationError, match="token in HF_TOKEN has no access") as caught:
        fetch()
    assert "wrong-token" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert fetch().name == REPOSITORY


def test_the_token_file_of_hf_home_is_read(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "from-file"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("from-file\n")
    assert fetch().name == REPOSITORY


def test_an_unknown_repository_is_named(hub: FakeHub) -> None:
    with pytest.raises(ConfigurationError, match=r"no someone/nothing.*404"):
        fetch("someone/nothing")


def test_too_many_requests_are_waited_out_as_asked(hub: FakeHub) -> None:
    hub.busy = ["3", None, "0.5"]
    waits: list[float] = []
    with Hub(HubSettings.from_environment(), sleep=waits.append) as client:
        assert client.revision(REPOSITORY, "main").commit == COMMIT
    assert waits == [3.0, 2.0, 0.5]


@pytest.mark.parametrize(("busy", "num_waits"), [(["1"] * 20, 4), (["3600"], 0)])
def test_patience_ends(hub: FakeHub, busy: list[str | None], num_waits: int) -> None:
    hub.busy = busy
    waits: list[float] = []
    with (
        Hub(HubSettings.from_environment(), sleep=waits.append) as client,
        pytest.raises(ConfigurationError, match="answered 429"),
    ):
        client.revision(REPOSITORY, "main")
    assert len(waits) == num_waits


def test_a_pinned_hash_holds_whatever_the_hub_announces(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    source = HubSource(REPOSITORY, COMMIT, {WEIGHTS: "1" * 64})
    with pytest.raises(ConfigurationError, match=r"model\.safetensors.*damaged"):
        fetch_repository(source, tmp_path / "staging", tmp_path, licence=None, report=lambda line: None)
    repository = tmp_path / "hf" / "hub" / "models--someone--small-model"
    write_folder(repository / "snapshots" / COMMIT, model_files())
    with pytest.raises(ConfigurationError, match="huggingface_hub's cache is damaged"):
        fetch_repository(source, tmp_path / "staging", tmp_path, licence=None, report=lambda line: None)


def test_offline_says_what_to_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError, match=r"HF_HUB_OFFLINE.*headwater pull"):
        fetch()
    assert not hub.seen


def test_what_huggingface_hub_has_is_not_fetched_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hf" / "hub" / "models--someone--small-model"
    write_folder(repository / "snapshots" / COMMIT, model_files())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    folder = fetch()
    assert folder.revision == COMMIT
    assert folder.path.is_relative_to(tmp_path / "cache")
    assert not hub.seen


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        (WEIGHTS, "no safetensors weights. Pickled"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_download(hub: FakeHub, missing: str, message: str) -> None:
    del hub.files[missing]
    with pytest.raises(ConfigurationError, match=message):
        fetch()
    assert len(hub.seen) == 1


def test_something_else_than_a_hub_is_told(hub: FakeHub) -> None:
    hub.description = lambda: b"<html>login</html>"  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="check HF_ENDPOINT"):
        fetch()
