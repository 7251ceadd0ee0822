"""What is said where a card cannot serve: no driver, an old one, no memory left, a dtype that it lacks."""

import pytest

from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable

torch = pytest.importorskip("torch", reason="the cuda tier needs torch")
card = pytest.importorskip("app.runner.torch.card")
loading = pytest.importorskip("app.runner.torch.loading")

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "build", "reason", "remedy"),
    [
        ("Torch not compiled with CUDA enabled", None, "this torch has no CUDA", "a CUDA build of torch"),
        (
            "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver",
            "12.8",
            "no NVIDIA driver answers",
            "--gpus all",
        ),
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
            "12.8",
            "the NVIDIA driver knows CUDA 11.4 and this torch is built for CUDA 12.8",
            "a newer driver",
        ),
        ("No CUDA GPUs are available", "12.8", "shows no card to this process", "CUDA_VISIBLE_DEVICES"),
        ("Error 802: system not yet initialized\nmore", "12.8", "does not start: Error 802: system not yet", "cpu"),
        ("", "12.8", "CUDA does not start: it does not say why", "--device cpu"),
    ],
)
def test_no_card(message: str, build: str | None, reason: str, remedy: str) -> None:
    unavailable = card.no_card(message, build=build)
    assert reason in unavailable.reason
    assert remedy in unavailable.remedy
    assert "\n" not in f"{unavailable.reason}{unavailable.remedy}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: there is a card here")
def test_a_machine_without_a_card_says_so() -> None:
    with pytest.raises(TierUnavailable):
        card.find_card()


def test_weights_that_do_not_fit_say_who_holds_the_memory() -> None:
    card.check_room(16 * GIB, free=16 * GIB, total=24 * GIB, card="A10")
    with pytest.raises(TierUnavailable, match=r"take 16.0 GiB and A10 has 3.0 GiB free: other processes hold 21.0 GiB"):
        card.check_room(16 * GIB, free=3 * GIB, total=24 * GIB, card="A10")
    with pytest.raises(TierUnavailable, match=r"A10 has 24.0 GiB in all$"):
        card.check_room(30 * GIB, free=20 * GIB, total=24 * GIB, card="A10")


def test_a_dtype_that_the_card_lacks() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(dtype="bfloat16")
    device = torch.device("cuda")
    with pytest.raises(ConfigurationError, match=r"capability 7.5\) has no bfloat16 arithmetic: use --dtype float16"):
        loading.choose_dtype("bfloat16", config, device, capability=(7, 5))
    assert loading.choose_dtype("auto", config, device, capability=(7, 5))[0] == torch.float32
    assert loading.choose_dtype("float16", config, device, capability=(7, 5))[0] == torch.float16
    assert loading.choose_dtype("auto", config, device, capability=(8, 0)) == (torch.bfloat16, "the checkpoint's")
