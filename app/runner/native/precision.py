"""What each linear computes in: the published points between bf16 and int4.

int8 weights have one scale an output column. Their inputs are quantised a token at a time, to 8 bits or,
where a few large values would drown the rest (INT8_WIDE), to 16 bits in two bytes: exact products again,
the same bytes of weights read, twice the arithmetic.

int4 is weights in blocks of 32, a scale each, as GGUF files have them, and inputs in blocks of 32 bytes
(`blocks`): mostly 4 bits, 8 where the file says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum


class Form(IntEnum):
    """How a linear's weights and inputs are kept."""

    BF16 = 0
    INT8 = 1
    INT8_WIDE = 2
    BLOCKS = 3

    @property
    def byte_rows(self) -> int:
        """Rows of bytes that hold one row of inputs."""
        return 1 if self is Form.BLOCKS else int(self)


@dataclass(frozen=True)
class Precision:
    """The form of each linear of a layer, and of the head."""

    qkv: Form
    output: Form
    gate_up: Form
    down: Form
    head: Form

    @property
    def byte_rows(self) -> int:
        """Rows of bytes that a step keeps for one row of inputs."""
        return max(form.byte_rows for form in (self.qkv, self.output, self.gate_up, self.down, self.head))

    @property
    def has_blocks(self) -> bool:
        """All linears are in blocks, and the embedding too."""
        return self.head is Form.BLOCKS


def _throughout(form: Form) -> Precision:
    return Precision(qkv=form, output=form, gate_up=form, down=form, head=form)


BFLOAT16 = _throughout(Form.BF16)

QUANTIZATIONS: Mapping[str, Precision] = {
    "int4": _throughout(Form.BLOCKS),
    "int8": _throughout(Form.INT8),
    "int8-safe": Precision(
        qkv=Form.INT8_WIDE, output=Form.INT8, gate_up=Form.INT8, down=Form.INT8_WIDE, head=Form.INT8_WIDE
    ),
}
"""By the name that --quantization takes."""


def precision_of(quantization: str | None) -> Precision:
    """None is bf16 throughout. Raises KeyError for a name that is not in QUANTIZATIONS."""
    return BFLOAT16 if quantization is None else QUANTIZATIONS[quantization]
