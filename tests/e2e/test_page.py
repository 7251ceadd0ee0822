"""The page in a real browser, against a real server: typed, streamed, stopped, forked, attacked and looked at.

The scripted tier speaks, so that answers are known and an engine is back half a second after its death.
What it says is hostile markup, and characters of several tokens. After every test: no error in the
browser's console, no request to another host.

`PAGE_SCREENSHOTS=1` also takes the pictures in docs/images, with the default model.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from app.text.tokenizer import Tokenizer
from tests.e2e.browser import launched
from tests.e2e.serving import serve_default_model
from tests.store_models import default_model_folder

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> 龘靐 & <b>bold</b>\n"
IMAGES = Path(__file__).parents[2] / "docs" / "images"
MAX_PAGE_BYTES = 150_000
MAX_IMAGE_BYTES = 300_000
SCREENSHOTS = os.environ.get("PAGE_SCREENSHOTS") == "1"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


def scripted() -> tuple[str, ...]:
    """Flags of a server that says HOSTILE over and over."""
    token_ids = Tokenizer.load(default_model_folder().path).encode_now(HOSTILE, False)
    script = {
        "vocab_size": 49152,
        "tokens": ",".join(map(str, token_ids)),
        "step_seconds": 0.004,
        "load_seconds": 0.5,
    }
    return ("--tier", "scripted", "--scripted", json.dumps(script))


@pytest.fixture(scope="module")
def url(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_default_model(tmp_path_factory.mktemp("page") / "log", *scripted()) as (_, url):
        yield url


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page in a fresh profile; afterwards, nothing may have gone wrong in any of them."""
    complaints: list[str] = []
    contexts = []

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}, "locale": "en-US"} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: _note(complaints, message.type, message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: _check_host(complaints, request.url, url))
        page.goto(url)
        expect(page.locator("#model-facts")).not_to_have_attribute("hidden", "")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _note(complaints: list[str], kind: str, text: str) -> None:
    # A refusal that a test provokes (400, 401) is reported by the browser as an error of the network.
    if kind in ("error", "warning") and not re.search("the server responded with a status of 40[01]", text):
        complaints.append(text)


def _check_host(complaints: list[str], address: str, url: str) -> None:
    if not address.startswith((url, "blob:")):
        complaints.append(f"a request to {address}")


def run(page: Page, prompt: str, **settings: str) -> None:
    """Type a prompt, run it from the keyboard, wait for its end."""
    for name, value in settings.items():
        page.fill(f"#f-{name}", value)
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    finish(page)


def finish(page: Page) -> None:
    """Wait for the end of a run that has been started."""
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator(".tok").first).to_be_visible()


def answer_of(page: Page) -> str:
    return page.locator("#tokens").text_content() or ""


def test_a_first_visitor_presses_run(visit: Open) -> None:
    page = visit()
    prompt = page.locator("#prompt").input_value()
    assert prompt
    page.click("#run")
    finish(page)
    assert answer_of(page).startswith("<img src=x")
    assert page.locator("#shown-prompt").text_content() == prompt
    assert page.locator(".tok").count() == 64
    assert page.locator(".tok.p3, .tok.p4").count() > 0
    expect(page.locator("#facts")).to_contain_text("64 tokens")
    expect(page.locator("#facts")).to_contain_text("seed")
    expect(page.locator("#engine-line")).to_contain_text("engine 1")
    expect(page.locator("#ttft td").first).to_contain_text("ms")


def test_markup_in_an_answer_stays_text(visit: Open) -> None:
    page = visit()
    run(page, "a <b>prompt</b>", max_tokens="120")
    assert HOSTILE in answer_of(page)
    assert page.locator("#answer img, #answer script, #tree img, #tokens b").count() == 0
    assert page.title() == "Headwater"
    assert page.locator("#shown-prompt").text_content() == "a <b>prompt</b>"


def test_a_character_of_several_tokens_is_whole(visit: Open) -> None:
    page = visit()
    run(page, "x")
    assert "龘靐" in answer_of(page)
    assert page.locator(".tok.part").count() >= 2


def test_stop_ends_the_sequence_in_the_engine(visit: Open, url: str) -> None:
    page = visit()
    page.fill("#f-max_tokens", "2000")
    page.fill("#prompt", "On and on")
    page.click("#run")
    expect(page.locator(".tok[data-index='20']")).to_be_attached()
    page.keyboard.press("Escape")
    finish(page)
    expect(page.locator("#facts")).to_contain_text("stopped")
    assert page.locator(".tok").count() < 2000
    expect(page.locator("#n-running")).to_have_text("0")
    view = httpx.get(f"{url}/engine").json()
    assert (view["num_running"], view["num_waiting"]) == (0, 0)


def test_an_alternative_forks_the_answer_there(visit: Open) -> None:
    page = visit()
    run(page, "A prompt that is long enough for one whole block of the cache, " * 4, max_tokens="24")
    before = page.locator(".tok").all_text_contents()
    page.locator(".tok").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#popover .choice")).to_have_count(5)
    chosen = page.locator("#popover .choice:enabled .what").first.text_content()
    with page.expect_request("**/v1/completions") as sent:
        page.keyboard.press("Enter")
    body = json.loads(sent.value.post_data or "")
    finish(page)
    after = page.locator(".tok").all_text_contents()
    assert after[:3] == before[:3] and after[3] == (chosen or "").replace("␣", " ") != before[3]
    assert all(isinstance(token_id, int) for token_id in body["prompt"])
    assert page.locator(".tok.picked").count() == 1 and len(after) == 4 + 24
    assert page.locator("#tree li li").count() == 1
    cached = page.locator("#facts").text_content() or ""
    assert " 0 of" not in cached and "prompt tokens cached" in cached
    page.locator("#tree button[aria-current]").wait_for()
    page.locator("#tree > ul > li > .branch button").first.click()
    assert page.locator(".tok").all_text_contents() == before


def test_own_words_fork_the_answer_too(visit: Open) -> None:
    page = visit()
    run(page, "Hello", max_tokens="8")
    page.locator(".tok").nth(2).click()
    page.fill("#popover input", " 龘 quite else")
    page.keyboard.press("Enter")
    expect(page.locator(".tok.picked").first).to_be_visible()
    finish(page)
    assert " 龘 quite else<img" in answer_of(page)


def test_a_tree_is_saved_and_loaded(visit: Open, tmp_path: Path) -> None:
    page = visit()
    run(page, "Save me", max_tokens="8")
    page.locator(".tok").nth(2).click()
    page.locator("#popover .choice:enabled").first.click()
    finish(page)
    expect(page.locator("#tree li")).to_have_count(2)
    with page.expect_download() as download:
        page.click("#save")
    file = tmp_path / "tree.json"
    download.value.save_as(file)
    shown = answer_of(page)

    other = visit()
    other.set_input_files("#file", file)
    expect(other.locator("#tree li")).to_have_count(2)
    other.locator("#tree li li button").first.click()
    assert answer_of(other) == shown
    file.write_text('{"format": "headwater-branches", "version": 1, "nodes": [{"id": 1, "parent": 7, "kind": "fork"}]}')
    other.set_input_files("#file", file)
    expect(other.locator("#error")).to_contain_text("no branches")
    expect(other.locator("#tree li")).to_have_count(2)


def test_a_hand_over_is_drawn_where_it_happened(visit: Open, url: str) -> None:
    page = visit()
    page.fill("#f-max_tokens", "300")
    page.fill("#prompt", "Survive")
    page.click("#run")
    expect(page.locator(".tok[data-index='40']")).to_be_attached()
    os.kill(httpx.get(f"{url}/ready").json()["engine_pid"], signal.SIGKILL)
    expect(page.locator(".hand-over")).to_have_count(1, timeout=20_000)
    expect(page.locator(".hand-over")).to_contain_text("pause")
    expect(page.locator("#stop")).to_be_disabled(timeout=20_000)
    assert page.locator(".tok").count() == 300
    whole = (HOSTILE * 20)[:400]
    assert page.locator(".tok").evaluate_all("all => all.map(one => one.textContent).join('')").startswith(whole)
    expect(page.locator("#hand-overs li").first).to_contain_text("took over")


def test_a_chat_goes_on(visit: Open) -> None:
    page = visit()
    page.click("#mode-chat")
    page.fill("#system", "Be brief.")
    run(page, "First question", max_tokens="6")
    with page.expect_request("**/v1/chat/completions") as sent:
        run(page, "Second question")
    roles = [message["role"] for message in json.loads(sent.value.post_data or "")["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert page.locator("#turns .turn").count() == 4
    page.click("#code")  # with nothing typed: the question that is shown
    code = page.locator("#code-text").text_content() or ""
    assert code.count('"role"') == 4 and '"Second question"' in code and '""' not in code
    page.keyboard.press("Escape")
    page.locator(".tok").nth(1).click()
    page.locator("#popover .choice:enabled").first.click()
    finish(page)
    assert page.locator("#tree li li li").count() == 1


def test_copied_code_runs(visit: Open) -> None:
    page = visit()
    page.fill("#f-max_tokens", "4")
    page.fill("#f-top_k", "7")
    page.fill("#prompt", 'It\'s "quoted" \\ 好\n')
    page.click("#code")
    curl = page.locator("#code-text").text_content() or ""
    done = subprocess.run(["bash", "-euc", curl], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.rstrip().endswith("data: [DONE]")
    page.click("#code-python")
    python = page.locator("#code-text").text_content() or ""
    compile(python, "copied", "exec")
    assert 'extra_body={"top_k": 7}' in python
    page.keyboard.press("Escape")
    expect(page.locator("#code-box")).not_to_be_visible()


def test_a_refused_setting_is_named(visit: Open) -> None:
    page = visit()
    page.fill("#f-temperature", "9")
    page.click("#run")
    expect(page.locator("#error")).to_contain_text("temperature")
    assert page.locator("#f-temperature").get_attribute("aria-invalid") == "true"
    page.fill("#f-temperature", "")
    page.fill("#f-seed", "99999999999999999999999")
    page.click("#run")
    expect(page.locator("#error")).to_contain_text("seed")
    expect(page.locator("#tree li")).to_have_count(0)


def test_an_answer_keeps_to_a_schema(visit: Open) -> None:
    page = visit()
    page.locator(".inner > summary").click()
    schema = {"properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    page.fill("#f-response_format", json.dumps({"type": "object"} | schema))
    run(page, "Is it?", max_tokens="120")
    assert set(json.loads(answer_of(page))) == {"ok"}
    page.fill("#f-response_format", '{"type": "objec"}')
    page.click("#run")
    expect(page.locator("#error")).to_contain_text("objec")
    page.fill("#f-response_format", '{"type": ')
    page.click("#run")
    expect(page.locator("#error")).to_contain_text("JSON")


def test_a_prompt_can_be_scored(visit: Open) -> None:
    page = visit()
    page.locator(".inner > summary").click()
    page.check("#f-echo")
    run(page, "Score 龘 this", max_tokens="5")
    expect(page.locator("#shown-prompt .scored").first).to_be_visible()
    assert page.locator("#shown-prompt").text_content() == "Score 龘 this"
    assert page.locator(".tok").count() == 5


def test_samples_become_branches(visit: Open) -> None:
    page = visit()
    run(page, "Thrice", n="3", max_tokens="5")
    expect(page.locator("#tree > ul > li")).to_have_count(3)


def test_it_fits_a_phone(visit: Open) -> None:
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.tap("#run")
    finish(page)
    page.locator(".tok").nth(4).tap()
    expect(page.locator("#popover")).to_be_visible()
    place = page.locator("#popover").bounding_box()
    assert place is not None and place["x"] == 0 and place["width"] == 360
    page.keyboard.press("Escape")
    for part in ("#engine", "#settings"):
        page.locator(f"{part} > summary").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_it_speaks_chinese(visit: Open) -> None:
    page = visit(locale="zh-CN")
    expect(page.locator("#run")).to_contain_text("运行")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    page.click("#language")
    expect(page.locator("#run")).to_contain_text("Run")


def test_all_words_are_there_in_both_languages() -> None:
    text = resources.files("app.api").joinpath("web", "i18n.js").read_text()
    english, chinese = text.split("  zh: {")
    keys = [set(_keys(part)) for part in (english, chinese.split("};")[0])]
    assert len(keys[0]) > 60 and keys[0] - {"en", "zh"} == keys[1]


def _keys(text: str) -> list[str]:
    return re.findall(r"(?:^|[,{]\s*|\n\s+)([a-z][A-Za-z0-9]*): [\"]", text)


def test_with_keys_it_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    complaints: list[str] = []
    keys = tmp_path / "keys"
    keys.write_text("team: sesame-sesame-sesame\n")
    with serve_default_model(tmp_path / "log", *scripted(), "--api-key-file", str(keys)) as (_, url):
        page = browser.new_page(locale="en-US")
        page.on("console", lambda message: _note(complaints, message.type, message.text))
        page.goto(url)
        expect(page.locator("#key-box")).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-box")).to_be_visible()
        page.fill("#key", "sesame-sesame-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#model-facts")).not_to_have_attribute("hidden", "")
        run(page, "x", max_tokens="5")
        assert page.locator(".tok").count() == 5
        page.context.close()
    assert complaints == []


def test_it_is_small(visit: Open) -> None:
    entries = visit().evaluate("performance.getEntries().map(one => [one.name, one.decodedBodySize ?? 0])")
    sizes = {name: size for name, size in entries if "/page/" in name or name.endswith("/")}
    assert len(sizes) >= 8 and all(sizes.values())
    assert sum(sizes.values()) < MAX_PAGE_BYTES


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(visit: Open, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    assert violations(page) == []
    page.locator(".inner > summary").click()
    run(page, "Look at this")
    page.mouse.move(0, 0)
    assert violations(page) == []
    page.locator(".tok").nth(3).click()
    expect(page.locator("#popover")).to_be_visible()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.click("#help")
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.click("#mode-chat")
    page.click("#language")
    assert violations(page) == []


def violations(page: Page) -> list[str]:
    """What axe-core objects to."""
    page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    return [f"{rule['id']}: {node['html'][:160]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.skipif(not SCREENSHOTS, reason="pictures are taken when asked for: PAGE_SCREENSHOTS=1")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_take_the_pictures(browser: Browser, tmp_path: Path, scheme: Literal["light", "dark"]) -> None:
    IMAGES.mkdir(exist_ok=True)
    with serve_default_model(tmp_path / "log") as (_, url):
        context = browser.new_context(viewport={"width": 1240, "height": 800}, color_scheme=scheme, locale="en-US")
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#model-facts")).not_to_have_attribute("hidden", "")
        run(page, "The three largest oceans are", max_tokens="90", seed="7")
        page.fill("#prompt", "Once upon a time")
        page.fill("#f-max_tokens", "110")
        page.click("#run")
        expect(page.locator(".tok[data-index='45']")).to_be_attached(timeout=20_000)
        os.kill(httpx.get(f"{url}/ready").json()["engine_pid"], signal.SIGKILL)
        expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
        for index in (12, 75):
            page.locator("#tree > ul > li > .branch button").first.click()
            page.locator(".tok").nth(index).click()
            page.locator("#popover .choice:enabled").first.click()
            expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
        page.evaluate("scrollTo(0, 0)")
        places = enumerate(page.locator(".tok").nth(index).bounding_box() for index in range(40))
        left = next(index for index, place in places if index > 14 and place is not None and 60 < place["x"] < 300)
        page.locator(".tok").nth(left).click()
        expect(page.locator("#popover")).to_be_visible()
        picture = IMAGES / f"page-{scheme}.png"
        page.screenshot(path=picture)
        context.close()
        assert picture.stat().st_size < MAX_IMAGE_BYTES
