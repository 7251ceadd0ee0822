"""What an engine tells of itself, where a test does not care."""

from app.core.types import EngineLimits, StepStats

STEP = StepStats(
    step_id=1,
    step_seconds=0.003,
    num_prefill_tokens=10,
    num_decode_tokens=2,
    num_running=3,
    num_waiting=2,
    num_kv_blocks_used=16,
    num_kv_blocks=64,
    total_preemptions=2,
    total_prefix_query_tokens=100,
    total_prefix_hit_tokens=40,
)
LIMITS = EngineLimits(
    max_model_len=64,
    vocab_size=10,
    eos_token_ids=(1,),
    num_kv_blocks=64,
    block_size=16,
    kv_bytes=0,
    weight_bytes=0,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    device="cpu",
    dtype="float32",
    tier="scripted",
    tier_reason="",
    row_independent=True,
    fingerprint="f",
    load_seconds=0.0,
)
