"""From a trained model to a folder that `headwater serve` takes at once."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from app.training.tokenizer import TOKENIZER_FILES

_NOT_OF_A_DECODER = frozenset(
    [
        "_name_or_path", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id",
        "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    ]
)  # fmt: skip
"""What transformers writes for every model; a runner that knows each field it reads would have to know these."""


def export_model(model: PreTrainedModel, tokenizer_folder: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    The folder appears whole, in place of one that was there.
    """
    draft = target.with_name(f".draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in model.config.to_dict().items() if value is not None}
    config |= {"architectures": [type(model).__name__], "torch_dtype": str(dtype).removeprefix("torch.")}
    config = {name: value for name, value in config.items() if name not in _NOT_OF_A_DECODER}
    (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    (draft / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, draft / name)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
