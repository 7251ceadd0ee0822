"""A model in this process, through transformers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from app.training.devices import choose_dtype
from app.training.evaluation.scorer import Generation, Scores, TokenIds


class LocalScorer:
    """Computes one sequence at a time, so that no score depends on its neighbours."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, dtype: Literal["auto", "bfloat16", "float32"] = "float32"
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(choose_dtype(dtype, self._device)).to(self._device).eval()
        self._tokenizer = tokenizer

    @property
    def context(self) -> int:
        """One less than the model's, as a server has it: a prompt that fills it leaves nothing to answer."""
        return int(self._model.config.max_position_embeddings) - 1

    def score(self, sequences: Sequence[TokenIds]) -> list[Scores]:
        """As Scorer says."""
        return [self._score(token_ids) for token_ids in sequences]

    def generate(self, generations: Sequence[Generation]) -> list[str]:
        """As Scorer says."""
        return [self._generate(generation) for generation in generations]

    def _score(self, token_ids: TokenIds) -> Scores:
        ids = torch.tensor(token_ids, device=self._device)
        with torch.no_grad():
            logits = self._model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        logprobs = nn.functional.log_softmax(logits, dim=-1)  # (num_tokens - 1, vocab_size)
        chosen = logprobs.gather(1, ids[1:, None])[:, 0]
        return Scores(tuple(chosen.tolist()), tuple((chosen >= logprobs.amax(-1)).tolist()))

    def _generate(self, generation: Generation) -> str:
        ids = torch.tensor([generation.prompt], device=self._device)
        stop = {"stop_strings": list(generation.stop), "tokenizer": self._tokenizer} if generation.stop else {}
        with torch.no_grad():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=generation.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
                **stop,
            )
        text = self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return cut_at(text, generation.stop)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(places)] if places else text
