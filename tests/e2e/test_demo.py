"""`headwater demo` on the default model: a server of its own, real kills, equal hashes."""

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from app.runner.base import TierUnavailable
from app.runner.native.levels import choose_level
from app.terminal.demo import DemoOptions, run_demo
from app.terminal.demo_prompts import demo_prompts
from scripts.record_demo import recorder, to_svg
from tests.store_models import default_model_folder

NUM_KILLS = 5
OPTIONS = DemoOptions(
    max_tokens=32,
    prompts=demo_prompts()[:6],
    num_kills=NUM_KILLS,
    serve_arguments=("--tier", "native", "--kv-cache-gib", "0.1", "--num-threads", "1"),
)


def test_the_same_answers_through_five_kills() -> None:
    try:
        choose_level()
    except TierUnavailable as error:
        pytest.skip(f"the native tier cannot run here: {error}")
    default_model_folder()
    console = recorder(io.StringIO())
    result = run_demo(OPTIONS, console=console, progress=Console(file=io.StringIO()))

    printed = console.export_text(clear=False)
    assert result.verdict.exit_code == 0, printed
    assert [done.num_finished for done in result.rounds] == [len(OPTIONS.prompts)] * 3
    (digest,) = {done.digest for done in result.rounds}
    assert f"Three equal hashes:\n{digest}\n" in printed
    assert len({kill.pid for kill in result.rounds[2].kills}) == NUM_KILLS
    assert printed.count("kill -9 ") == 1 + NUM_KILLS
    assert all(done.outcomes[0].text.strip() for done in result.rounds)

    picture = to_svg(console)
    words = " ".join("".join(ElementTree.fromstring(picture).itertext()).split())
    assert digest in words and re.search(r"kill -9 \d+ after", words)
