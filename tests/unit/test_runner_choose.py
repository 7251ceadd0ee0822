"""Which tiers `auto` tries, and in which order."""

import logging
from pathlib import Path

import pytest

from app.core.config import EngineConfig
from app.runner.choose import auto_order, has_nvidia_device


def test_a_device_comes_first_unless_the_cpu_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(model_dir="/nowhere")
    on_cpu = EngineConfig(model_dir="/nowhere", device="cpu")
    assert auto_order(config, has_device=lambda: False) == ("native", "cuda", "any")
    assert auto_order(on_cpu, has_device=lambda: True) == ("native", "cuda", "any")
    with caplog.at_level(logging.INFO, logger="headwater.runner"):
        assert auto_order(config, has_device=lambda: True) == ("cuda", "native", "any")
    assert "NVIDIA" in caplog.text


def test_the_driver_shows_its_devices(tmp_path: Path) -> None:
    assert not has_nvidia_device(tmp_path)
    gpus = tmp_path / "proc/driver/nvidia/gpus"
    gpus.mkdir(parents=True)
    assert not has_nvidia_device(tmp_path)
    (gpus / "0000:01:00.0").mkdir()
    assert has_nvidia_device(tmp_path)


def test_the_control_device_of_the_driver_is_enough(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert has_nvidia_device(tmp_path)
