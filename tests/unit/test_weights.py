"""Which folder of weights the settings mean."""

import json
from pathlib import Path

import pytest

from app.settings import Settings
from app.weights import find_model
from tests.gguf_maker import small_model_fields, small_model_tensors, tokenizer_fields, write_gguf

TINY: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_tiny.json").read_text())


@pytest.mark.parametrize(
    ("quantization", "file"),
    [(None, "model.safetensors"), ("int8", "model.safetensors"), ("int4", "model.gguf.index.json")],
)
def test_a_gguf_is_bfloat16_unless_int4_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None, file: str
) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    fields = small_model_fields("llama", vocab_size=960) | tokenizer_fields(TINY, pre="smollm")
    write_gguf(tmp_path / "small.gguf", fields, small_model_tensors(vocab_size=960))
    settings = Settings.model_validate({"model": str(tmp_path / "small.gguf"), "quantization": quantization})
    lines: list[str] = []
    assert (find_model(settings, report=lines.append).path / file).is_file()
    assert len(lines) == (quantization != "int4")
