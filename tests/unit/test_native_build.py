"""Finding, building and refusing the kernels: each failure is one clause with a remedy."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.memory import EngineMemory
from app.runner.base import TierUnavailable
from app.runner.memory import num_cpus
from app.runner.native import build, load
from app.runner.native.levels import ISA_VARIABLE, LEVELS, choose_level
from app.runner.native.library import Library
from tests.native_models import write_model

V3 = "flags : fpu avx avx2 bmi1 bmi2 f16c fma movbe\n"


def cpuinfo(folder: Path, text: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(text)
    return path


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function in place of the kernels, so that building takes no time, and no prebuilt library."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "one.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "lib")


def test_the_best_level_of_the_cpu_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    wide = V3.rstrip() + " avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 avx512_vnni\n"
    assert choose_level(cpuinfo=cpuinfo(tmp_path, V3), machine="x86_64").name == "avx2"
    assert choose_level(cpuinfo=cpuinfo(tmp_path, wide), machine="x86_64").name == "avx512bf16"
    assert choose_level(cpuinfo=cpuinfo(tmp_path, wide), machine="x86_64", forced="avx2").name == "avx2"


@pytest.mark.parametrize(
    ("flags", "machine", "forced", "reason"),
    [
        ("flags : fpu sse2\n", "x86_64", "", "lacks avx, avx2"),
        (V3, "x86_64", "avx512bf16", "lacks avx512_bf16"),
        (V3, "x86_64", "mmx", "names no level"),
        (V3, "aarch64", "", "no native kernels for aarch64"),
    ],
)
def test_a_cpu_that_cannot_says_what_is_missing(
    tmp_path: Path, flags: str, machine: str, forced: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    with pytest.raises(TierUnavailable) as refused:
        choose_level(cpuinfo=cpuinfo(tmp_path, flags), machine=machine, forced=forced)
    assert reason in refused.value.reason


@pytest.mark.usefixtures("small_source")
def test_building_keeps_the_library_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    level = choose_level(forced="avx2")
    with caplog.at_level(logging.WARNING):
        first = build.find_or_build(level, cache=tmp_path / "new")
        again = build.find_or_build(level, cache=tmp_path / "new", compiler="/does/not/exist")
    assert first == again == tmp_path / "new" / build.library_name(level)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert list((tmp_path / "new").iterdir()) == [first]
    assert ctypes.CDLL(str(first)).one() == 1


@pytest.mark.usefixtures("small_source")
def test_a_prebuilt_library_is_taken_while_its_sources_are_the_same(tmp_path: Path) -> None:
    level = LEVELS[-1]
    prebuilt = build.build(level, build.PREBUILT)
    assert build.find_or_build(level, cache=tmp_path / "new", compiler="/does/not/exist") == prebuilt
    (build.SOURCES / "one.c").write_text("int one(void) { return 2; }\n")
    with pytest.raises(TierUnavailable, match="did not run"):
        build.find_or_build(level, cache=tmp_path / "new", compiler="/does/not/exist")


@pytest.mark.usefixtures("small_source")
def test_a_place_that_cannot_be_written_builds_for_this_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = choose_level(forced="avx2")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken = tmp_path / "file"
    taken.touch()
    with caplog.at_level(logging.WARNING):
        path = build.find_or_build(level, cache=taken / "native")
    assert path.is_file()
    assert "built for this start only" in caplog.messages[0]


@pytest.mark.parametrize(("compiler", "reason"), [("/does/not/exist", "did not run"), ("false", "could not build")])
def test_a_broken_compiler_is_one_clause(tmp_path: Path, compiler: str, reason: str) -> None:
    with pytest.raises(TierUnavailable, match=reason) as refused:
        build.build(LEVELS[-1], tmp_path, compiler=compiler)
    assert refused.value.remedy == build.REMEDY
    assert list(tmp_path.iterdir()) == []


def test_a_broken_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"not a library")
    with pytest.raises(TierUnavailable, match="do not load"):
        Library(tmp_path / "lib.so")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "cuda"}, "device is cuda"),
        ({"dtype": "float32"}, "dtype is float32"),
        ({"quantization": "int3"}, "no quantization 'int3'"),
    ],
)
def test_settings_that_it_does_not_serve(settings: dict[str, str | int], reason: str, tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable) as refused:
        load(EngineConfig(model_dir=str(tmp_path), **settings))  # type: ignore[arg-type]
    assert reason in refused.value.reason


def test_a_block_size_that_would_cost_the_tier_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(ConfigurationError, match=r"--block-size 7: .* blocks of 64 tokens.*--tier any"):
        load(EngineConfig(model_dir=str(tmp_path), block_size=7, num_kv_blocks=8), EngineMemory())


def test_more_threads_than_cores_are_told(tmp_path: Path) -> None:
    write_model(tmp_path)
    cores = num_cpus()
    runner = load(EngineConfig(model_dir=str(tmp_path), num_kv_blocks=8, num_threads=cores + 1), EngineMemory())
    assert f"{cores + 1} threads on {cores} core" in runner.info.tier_reason
    runner.close()


def test_a_loaded_native_tier_has_no_torch(tmp_path: Path) -> None:
    write_model(tmp_path)
    script = (
        "import sys; from app.core.config import EngineConfig; from app.runner.native import load\n"
        f"runner = load(EngineConfig(model_dir={str(tmp_path)!r}, num_kv_blocks=8))\n"
        "assert runner.info.row_independent and runner.info.max_num_batched_tokens % 64 == 0, runner.info\n"
        "runner.close()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
