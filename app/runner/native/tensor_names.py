"""The one table of tensor names: how each family's tensors become those that the packer knows.

The packer knows llama's names, with two more for norms behind a branch (`post_attention_norm`,
`post_mlp_norm`) and `model.positions`. Fused matrices are cut into views, transposed ones turned round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from app.runner.native.safetensors import Tensor


@dataclass(frozen=True)
class TensorNames:
    """What a family calls things. Names are without `.weight` and `.bias`."""

    layers: str = "model.layers."
    in_layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name below a layer to the packer's; several share the rows in this order."""
    outside: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    """Names below a layer whose matrices are (inputs, outputs)."""
    prefix: str = ""
    """Before every name, where the exporter did not leave it out."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names that are no weights."""
    has_post_norms: bool = False
    has_norm_bias: bool = False
    has_positions: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

SPLIT = TensorNames()
"""llama and its kin."""
FUSED = TensorNames(
    in_layer={"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
)
"""phi3."""
SURROUNDED = TensorNames(
    in_layer={
        "post_attention_layernorm": ("post_attention_norm",),
        "pre_feedforward_layernorm": ("post_attention_layernorm",),
        "post_feedforward_layernorm": ("post_mlp_norm",),
    },
    has_post_norms=True,
)
"""gemma2 and gemma3: a norm before and one behind each branch."""
GPT2 = TensorNames(
    layers="h.",
    in_layer={
        "attn.c_attn": _QKV,
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.c_fc": ("mlp.up_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
        "ln_1": ("input_layernorm",),
        "ln_2": ("post_attention_layernorm",),
    },
    outside={"wte": "model.embed_tokens", "wpe": "model.positions", "ln_f": "model.norm"},
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    has_norm_bias=True,
    has_positions=True,
)


def known_tensors(tensors: Mapping[str, Tensor], names: TensorNames, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors under the packer's names; what no rule names keeps its own.

    `sizes`: rows of each part of a fused tensor, by the packer's name.
    """
    known: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        if full_name.endswith(names.ignored):
            continue
        stem, _, kind = full_name.removeprefix(names.prefix).rpartition(".")
        if stem in names.outside:
            known[f"{names.outside[stem]}.{kind}"] = tensor
        elif stem.startswith(names.layers):
            index, _, below = stem.removeprefix(names.layers).partition(".")
            parts = names.in_layer.get(below, (below,))
            turned = _turned(tensor) if below in names.transposed and kind == "weight" else tensor
            for part, rows in _cut(turned, parts, sizes):
                known[f"model.layers.{index}.{part}.{kind}"] = rows
        else:
            known[full_name] = tensor
    return known


def _turned(tensor: Tensor) -> Tensor:
    return replace(tensor, values=tensor.values.T)


def _cut(tensor: Tensor, parts: tuple[str, ...], sizes: Mapping[str, int]) -> list[tuple[str, Tensor]]:
    """The rows of each part; the last takes what is left, so that a wrong size is seen by whoever checks shapes."""
    cut, first = [], 0
    for part in parts[:-1]:
        cut.append((part, replace(tensor, values=tensor.values[first : first + sizes[part]])))
        first += sizes[part]
    rest = tensor if first == 0 else replace(tensor, values=tensor.values[first:])
    return [*cut, (parts[-1], rest)]
