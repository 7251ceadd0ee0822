"""Draws short texts from a model in training, without touching the state that training depends on."""

import tokenizers
import torch
from transformers import PreTrainedModel


def sample_text(
    model: PreTrainedModel, tokenizer: tokenizers.Tokenizer, prompt: str, *, num_tokens: int, seed: int
) -> str:
    """The prompt and what the model adds to it (temperature 0.7, top-p 0.95)."""
    was_training = model.training
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)  # (1, num_prompt_tokens)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
            pad_token_id=model.config.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(made[0].tolist())
