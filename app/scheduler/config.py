"""What the scheduler is told at its start, resolved: no "auto", no None."""

import msgspec

from app.core.errors import ConfigurationError


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and limits. Raises ConfigurationError where one of the sizes is below 1."""

    num_kv_blocks: int
    block_size: int
    """Token positions in a KV block."""
    max_model_len: int
    """The model's context length, in tokens."""
    max_num_seqs: int
    """Rows of the runner: sequences that run at once."""
    max_num_batched_tokens: int
    """Token budget of one step."""
    min_prefill_tokens: int = 0
    """Room for prefill beside the running rows in every step, at the budget's cost, so that many rows that
    decode never keep one another waiting, nor a new prompt for ever. 0: the budget is strict."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("num_kv_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def max_sequence_len(self) -> int:
        """Effective context: the smaller of the model's and what the pool holds for one sequence."""
        return min(self.max_model_len, self.num_kv_blocks * self.block_size)
