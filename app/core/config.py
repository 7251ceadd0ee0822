"""What the engine process is told at its start: a frozen value, sent as the first message."""

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of the engine. `None` and "auto" mean: decided at load, from the model and the machine."""

    model_dir: str
    """A canonical model folder (`app.store`)."""
    tier: str = "auto"
    """auto, native, cuda, any or scripted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float32 or float16."""
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    num_kv_blocks: int | None = None
    """Overrides kv_cache_bytes; tests force preemption with it."""
    block_size: int | None = None
    enable_prefix_caching: bool = True
    target_itl_ms: float | None = None
    num_threads: int | None = None
    deterministic: bool = False
    """Rows independent, or no start: tier native always has them, the torch tiers compute in fixed shapes then."""
    eos_token_ids: tuple[int, ...] = ()
    """What ends a text, as `app.store` read it from the model folder."""
    scripted: dict[str, float | int | str] = {}
    """Settings of the scripted runner (`app.runner.scripted`), used by tests and benchmarks alone."""
