"""Builds the model of a recipe from transformers' classes, and runs packed rows through one."""

import math

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from app.training.packing import NO_LABEL, Rows
from app.training.recipe import ModelTable

_RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
_LARGEST_LOGIT_STD = 0.25
"""At the start: keeps the first loss within 1 % of ln(vocabulary) at any width."""


def build_model(table: ModelTable, *, vocab_size: int, start_id: int, end_id: int, seed: int) -> PreTrainedModel:
    """A model with fresh float32 weights, the same for the same seed."""
    std = min(0.02, _LARGEST_LOGIT_STD / math.sqrt(table.hidden_size))
    common: dict[str, object] = {
        "vocab_size": vocab_size,
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "initializer_range": std,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _gpt2(table, common) if table.architecture == "gpt2" else _llama(table, common)
        _shrink_residual_projections(model, std=std / math.sqrt(2 * table.layers))
    return model.train()


def packed_logits(model: nn.Module, rows: Rows, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits in which no token has seen another document.

    Args:
        dtype: in which attention computes.
    """
    return model(
        input_ids=torch.from_numpy(rows.token_ids).to(device),
        position_ids=torch.from_numpy(rows.positions).to(device),
        attention_mask=_document_mask(torch.from_numpy(rows.documents).to(device), dtype=dtype),
        use_cache=False,
    ).logits  # (num_rows, context, vocab_size)


def _document_mask(documents: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores: made once here, where a Boolean mask would be turned over in each layer."""
    context = documents.shape[1]
    is_same = documents[:, :, None] == documents[:, None, :]  # (num_rows, context, context)
    is_before = torch.ones(context, context, dtype=torch.bool, device=documents.device).tril()
    mask = torch.zeros(is_same.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill_(~(is_same & is_before), -torch.inf)[:, None]  # (num_rows, 1, context, context)


def summed_loss(logits: Tensor, rows: Rows) -> Tensor:
    """Cross-entropy in nats, summed over the positions that have a label."""
    labels = torch.from_numpy(rows.labels).to(logits.device)
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1) if logits.dtype != torch.float64 else logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=NO_LABEL,
        reduction="sum",
    )


def _llama(table: ModelTable, common: dict[str, object]) -> PreTrainedModel:
    intermediate = table.intermediate_size
    config = LlamaConfig(
        hidden_size=table.hidden_size,
        num_hidden_layers=table.layers,
        num_attention_heads=table.heads,
        num_key_value_heads=table.heads if table.kv_heads is None else table.kv_heads,
        intermediate_size=-(-table.hidden_size * 8 // 3 // 64) * 64 if intermediate is None else intermediate,
        max_position_embeddings=table.context,
        rope_theta=table.rope_theta,
        attention_dropout=table.dropout,
        tie_word_embeddings=True,
        **common,
    )
    return LlamaForCausalLM(config)


def _gpt2(table: ModelTable, common: dict[str, object]) -> PreTrainedModel:
    config = GPT2Config(
        n_embd=table.hidden_size,
        n_layer=table.layers,
        n_head=table.heads,
        n_positions=table.context,
        n_inner=table.intermediate_size,
        resid_pdrop=table.dropout,
        embd_pdrop=table.dropout,
        attn_pdrop=table.dropout,
        tie_word_embeddings=True,
        **common,
    )
    return GPT2LMHeadModel(config)


def _shrink_residual_projections(model: PreTrainedModel, *, std: float) -> None:
    """As GPT-2: what is added to the residual stream begins smaller the more layers add to it."""
    for name, parameter in model.named_parameters():
        if name.endswith(_RESIDUAL_PROJECTIONS):
            nn.init.normal_(parameter, std=std)
