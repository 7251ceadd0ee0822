"""Examples as token ids, cut where a server would cut them, with the tokens of the answers marked.

What comes before an answer is encoded apart from it, as a server encodes a prompt before anything is answered. An
answer ends with the token that ends it in a chat, or with the end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.core.errors import ConfigurationError
from app.training.tuning.examples import Chat, Example, Pair, Plain


@dataclass(frozen=True)
class Encoded:
    """One example; both of the same length."""

    token_ids: tuple[int, ...]
    is_answer: tuple[bool, ...]
    """Tokens that the loss counts."""


class Encoder:
    """Encodes for one model; `tokenizer` is transformers' for it, `end_id` the token that ends a text."""

    def __init__(self, tokenizer: Any, *, end_id: int) -> None:
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._special = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.turn_ends: set[int] = set()
        """Special tokens that ended an answer in a chat: a server must stop at them."""

    def encode(self, example: Example) -> Encoded:
        """Raises ConfigurationError where the model's chat template cannot take a chat apart."""
        match example:
            case Plain(text):
                first, *rest = [*self._ids(text, is_begin=True), self._end_id]
                return _join([([first], False), (rest, True)])
            case Pair(prompt, completion):
                answer = [*self._ids(completion), self._end_id]
                return _join([(self._ids(prompt, is_begin=True), False), (answer, True)])
            case Chat():
                return self._encode_chat(example)

    def _encode_chat(self, chat: Chat) -> Encoded:
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        pieces: list[tuple[list[int], bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:index], add_generation_prompt=True)
            whole = self._render(messages[: index + 1], add_generation_prompt=False)
            if not (asked.startswith(done) and whole.startswith(asked)):
                raise ConfigurationError(
                    "the model's chat template writes earlier turns anew when a chat grows, so its answers cannot be "
                    "told apart; use `prompt` and `completion`"
                )
            pieces.append((self._ids(asked[len(done) :]), False))
            pieces.extend(self._answer(whole[len(asked) :]))
            done = whole
        return _join(pieces)

    def _answer(self, text: str) -> list[tuple[list[int], bool]]:
        """The answer up to its last special token, and what the template puts behind, which nobody has to learn."""
        ids = self._ids(text)
        ends = [place for place, token_id in enumerate(ids) if token_id in self._special]
        if not ends:
            return [([*ids, self._end_id], True)]
        self.turn_ends.add(ids[ends[-1]])
        return [(ids[: ends[-1] + 1], True), (ids[ends[-1] + 1 :], False)]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # jinja's errors, and whatever a template raises
            raise ConfigurationError(f"the model's chat template refuses an example: {error}") from error

    def _ids(self, text: str, *, is_begin: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=is_begin)["input_ids"])


def _join(pieces: Sequence[tuple[Sequence[int], bool]]) -> Encoded:
    return Encoded(
        tuple(token_id for ids, _ in pieces for token_id in ids),
        tuple(is_answer for ids, is_answer in pieces for _ in ids),
    )
