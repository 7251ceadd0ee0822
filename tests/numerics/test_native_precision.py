"""int8 linears are exact in their integers, whatever the tile's height; `int8-safe` is nearer to bf16 than `int8`."""

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_int32, c_void_p
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.runner.native.library import CLayer, address
from app.runner.native.precision import QUANTIZATIONS, Form
from app.runner.native.runner import NativeRunner
from app.runner.native.weights import PackedLinear
from tests.native_models import Hand, levels_here, load_native, prompt_ids, write_model

FORMS = [Form.INT8, Form.INT8_WIDE]
PROMPT = prompt_ids(40)


@pytest.fixture(params=levels_here())
def runner(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeRunner]:
    monkeypatch.setenv("HEADWATER_ISA", request.param)
    native = load_native(write_model(tmp_path), quantization="int8")
    yield native
    native.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_is_its_integers_times_the_scales(runner: NativeRunner, form: Form) -> None:
    weights = runner.model.weights.layers[0].qkv
    rng = np.random.Generator(np.random.PCG64(3))
    for rows in (1, 2, 3, 5, 6, 7, 13):
        inputs = rng.integers(0, 256, (rows * form, weights.k), dtype=np.uint8)
        scales = rng.random(rows, dtype=np.float32)
        out = run_qkv(runner, weights, form, inputs, scales)
        assert np.allclose(out, by_hand(weights, form, inputs, scales), rtol=1e-6, atol=1e-5), rows


def run_qkv(
    runner: NativeRunner, weights: PackedLinear, form: Form, inputs: NDArray[np.uint8], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The first layer's qkv over bytes, (rows, n_pad)."""
    run = runner.library.function(
        "hw_run_linears", None, c_void_p, POINTER(CLayer), c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p
    )
    layer = CLayer.from_buffer_copy(runner.model.layers[0])
    layer.qkv.byte_rows = int(form)
    out = np.zeros((len(scales), weights.n_pad), dtype=np.float32)
    run(runner.context, ctypes.byref(layer), 1, 0, len(scales), address(inputs), address(scales), address(out))
    return out


def by_hand(
    weights: PackedLinear, form: Form, inputs: NDArray[np.uint8], scales: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(rows, n_pad): integers in 64 bits."""
    assert weights.scale is not None
    w = weights.weight.reshape(-1, weights.k // 4, 64, 4).transpose(0, 2, 1, 3).reshape(weights.n_pad, weights.k)
    wide = inputs.astype(np.int64)
    x = wide - 128 if form is Form.INT8 else wide[0::2] * 256 + wide[1::2] - 32768
    sums = x @ w.astype(np.int64).T
    result: NDArray[np.float64] = sums * weights.scale.astype(np.float64) * scales.astype(np.float64)[:, None]
    return result


@pytest.mark.parametrize("level", levels_here())
def test_safer_is_nearer_to_bfloat16(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_ISA", level)
    folder = write_model(tmp_path)
    exact = last_logits(folder, None)
    errors = {name: float(np.abs(last_logits(folder, name) - exact).mean()) for name in QUANTIZATIONS}
    assert 0.0 < errors["int8-safe"] < 0.9 * errors["int8"] < errors["int4"], errors


def last_logits(folder: Path, quantization: str | None) -> NDArray[np.float32]:
    """Logits at each position of PROMPT, (40, vocab_size)."""
    native = load_native(folder, quantization=quantization)
    try:
        return Hand(native).prompt_logits(0, PROMPT, (0,))
    finally:
        native.close()


def test_precisions_have_their_own_fingerprints(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    names = (None, *QUANTIZATIONS)
    fingerprints = set()
    for name in names:
        native = load_native(folder, quantization=name)
        fingerprints.add(native.info.fingerprint)
        native.close()
    assert len(fingerprints) == len(names)


def test_another_config_has_another_fingerprint(tmp_path: Path) -> None:
    """The weights are the same, and the tokens are not."""
    fingerprints = []
    for changes in ({}, {}, {"rope_theta": 20000.0}):
        native = load_native(write_model(tmp_path, changes))
        fingerprints.append(native.info.fingerprint)
        native.close()
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
