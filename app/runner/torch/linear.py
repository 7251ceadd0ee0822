"""Linear layers with weights packed for oneDNN, on the CPU.

`F.linear` packs a bf16 weight anew in every call, and MKL's float32 kernels change a row's result with
the number of rows beside it. Packed once, and with two rows at least, neither happens. The operators
are private to torch: where they are missing or wrong, every layer stays as it is.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear` or a GPT-2 `Conv1D`: (..., in_features) -> (..., out_features)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` is (out_features, in_features), dense."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight.new_empty(0)
        """Nothing but dtype and device, which some families ask for."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        if len(rows) == 1:
            rows = rows.expand(2, -1).contiguous()
        out = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return out[: x.numel() // self.in_features].view(*x.shape[:-1], self.out_features)


def pack_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the linear layers of a CPU model; returns how many (0 where packing does not work here)."""
    if not packing_works(dtype):
        return 0
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            dense = _dense_weight(child)
            if dense is not None:
                bias = child.bias.data if isinstance(child.bias, torch.Tensor) else None
                setattr(parent, name, PackedLinear(dense, bias))
                num_packed += 1
    return num_packed


def packing_works(dtype: torch.dtype) -> bool:
    """Smoke test: the private operators exist and agree with `F.linear`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((96, 64), generator=generator).to(dtype)
    x = torch.randn((3, 64), generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    try:
        layer = PackedLinear(weight, bias)
        got = [layer(x), layer(x[:1])]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = nn.functional.linear(x.float(), weight.float(), bias.float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    errors = [(one.float() - expected[: len(one)]).abs().max() for one in got]
    return all(bool(error < tolerance) for error in errors)


def _dense_weight(module: nn.Module) -> torch.Tensor | None:
    """(out_features, in_features) of a layer that can be packed; subclasses may do more than a product."""
    weight = getattr(module, "weight", None)
    if type(module) is nn.Linear and weight is not None:
        return weight.data
    if type(module) is Conv1D and weight is not None:
        return weight.data.t()
    return None
