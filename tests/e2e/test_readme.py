"""What README and the tutorial tell people to paste does what it says: each block marked as tested is run as it stands.

Only the port differs: tests take a free one. README.zh-CN.md has the blocks of README (tests/unit/test_docs_readme.py).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import serve_default_model

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- tested -->\n```(\w+)\n(.*?)```", re.DOTALL)
PAGES = ("README.md", "docs/tutorial.md")
README_URL = "http://127.0.0.1:8000"


def blocks(page: str = "README.md") -> list[tuple[str, str]]:
    """Language and text of each block to run."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_default_model(tmp_path_factory.mktemp("readme") / "log") as (_, url):
        yield url


def run_block(language: str, text: str, url: str) -> str:
    """Standard output of a block, which must succeed."""
    assert README_URL in text
    shell = {"sh": ["bash", "-euc"], "python": [sys.executable, "-c"]}[language]
    done = subprocess.run([*shell, text.replace(README_URL, url)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def streamed_text(events: str) -> str:
    """The joined text of a stream that ended well."""
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_has_blocks_to_run(page: str) -> None:
    assert [language for language, _ in blocks(page)] == ["sh", "python", "sh"]


def test_the_curl_example_streams(url: str) -> None:
    assert len(streamed_text(run_block(*blocks()[0], url)).split()) >= 5


def test_the_client_example_streams_the_same_text_each_time(url: str) -> None:
    first, second = (run_block(*blocks()[1], url) for _ in range(2))
    assert first == second and len(first.split()) >= 5


def test_a_stream_outlives_its_engine(url: str) -> None:
    assert len(streamed_text(run_block(*blocks()[2], url)).split()) >= 50


def test_the_tutorial_does_what_it_says(url: str) -> None:
    curl, client, kill = blocks("docs/tutorial.md")
    assert streamed_text(run_block(*curl, url)) == streamed_text(run_block(*curl, url))
    assert run_block(*client, url).strip()
    assert kill == blocks()[2]


def test_the_default_model_is_the_one_of_the_examples(url: str) -> None:
    from app.store import default_model

    assert all(default_model() in text for page in PAGES for _, text in blocks(page))
    assert f"serves it on {README_URL.removeprefix('http://')}" in (ROOT / "README.md").read_text()
