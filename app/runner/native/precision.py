"""What each linear computes in: the published points between bf16 and int8.

int8 weights have one scale an output column. Their inputs are quantised a token at a time, to 8 bits or,
where a few large values would drown the rest (INT8_WIDE), to 16 bits in two bytes: exact products again,
the same bytes of weights read, twice the arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum


class Form(IntEnum):
    """How a linear's weights and inputs are kept. The value: rows of bytes that hold one row of inputs."""

    BF16 = 0
    INT8 = 1
    INT8_WIDE = 2


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
        return max(self.qkv, self.output, self.gate_up, self.down, self.head)


BFLOAT16 = Precision(qkv=Form.BF16, output=Form.BF16, gate_up=Form.BF16, down=Form.BF16, head=Form.BF16)

QUANTIZATIONS: Mapping[str, Precision] = {
    "int8": Precision(qkv=Form.INT8, output=Form.INT8, gate_up=Form.INT8, down=Form.INT8, head=Form.INT8),
    "int8-safe": Precision(
        qkv=Form.INT8_WIDE, output=Form.INT8, gate_up=Form.INT8, down=Form.INT8_WIDE, head=Form.INT8_WIDE
    ),
}
"""By the name that --quantization takes."""


def precision_of(quantization: str | None) -> Precision:
    """None is bf16 throughout. Raises KeyError for a name that is not in QUANTIZATIONS."""
    return BFLOAT16 if quantization is None else QUANTIZATIONS[quantization]
