"""Every change to logits and every draw, defined in numpy. Imports numpy and core, never torch.

A row's token depends on its logits, its own token ids, its parameters, its seed and its position, and
on nothing else. Other implementations (the torch port, a C pass) answer to the cases in
`tests/data/sampling_cases.json`. Order of the changes to the raw float32 logits:

1. repetition penalty over prompt and output, then presence and frequency penalty over the output,
2. logit_bias, allowed_token_ids, bad_words, min_tokens (bans EOS and stop ids), the grammar's mask,
3. temperature, min_p, top_k, top_p (each filter sees what the one before left, renormalised),
4. one draw. Temperature 0 takes the largest changed logit, ties to the lowest id, and skips 3.

Logprobs are of the raw logits, before 1.
"""

from app.runner.sampling.errors import RowError
from app.runner.sampling.logprobs import score_prompt
from app.runner.sampling.row import RowSampler

SAMPLER_EPOCH = 2
"""Part of the fingerprint: raised when the same logits, parameters and seed would bring other tokens."""

__all__ = ["SAMPLER_EPOCH", "RowError", "RowSampler", "score_prompt"]
