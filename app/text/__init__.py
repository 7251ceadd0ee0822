"""Text on one side, token ids on the other: tokenizer, detokenizer, stop strings, chat template.

Runs in the API process: it needs `tokenizers` and `jinja2`, and imports neither torch nor transformers.
"""

from app.text.chat_template import ChatTemplate
from app.text.detokenizer import Detokenizer
from app.text.stop import StopMatcher, StopStep
from app.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "StopStep", "Tokenizer"]
