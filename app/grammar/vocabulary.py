"""The model's tokens as llguidance wants them, from the model folder's tokenizer.json alone."""

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer

from app.grammar.errors import GrammarError, safe_message


def load_vocabulary(model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Takes a few tenths of a second. Raises GrammarError where the tokenizer is of a kind that cannot be constrained.

    Ids of the model beyond the tokenizer's are never allowed. Where the tokenizer has more than the model, so
    has the bitmask.
    """
    path = model_dir / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GrammarError(f"the model has no readable tokenizer for grammars ({type(error).__name__})") from None
    eos = [token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size] or None
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos)
    except ValueError:
        try:
            return LLTokenizer(text, eos_token=eos)
        except ValueError as error:
            reason = safe_message(str(error))
            raise GrammarError(f"this model's tokenizer cannot be constrained by grammars: {reason}") from None
