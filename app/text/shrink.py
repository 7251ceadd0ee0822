"""Decides whether a tokenizer can make text shorter before it cuts it into tokens.

Where it cannot, a text of more bytes than (context × longest token) has more tokens than the context,
and is refused without being tokenized. The answer errs towards "it may": an unknown component, a
normaliser that composes or drops characters, a pre-tokenizer that removes its separators, an added
token that swallows spaces.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from app.text.vocabulary import describe


def may_shrink(library: tokenizers.Tokenizer) -> bool:
    """Whether text is lost before the model's own cutting into tokens; bytes without a token are not counted."""
    return (
        not all(map(_normaliser_keeps, _flatten(describe(library.normalizer), "normalizers")))
        or not all(map(_pre_tokenizer_keeps, _flatten(describe(library.pre_tokenizer), "pretokenizers")))
        or any(token.lstrip or token.rstrip for token in library.get_added_tokens_decoder().values())
    )


def _flatten(component: Mapping[str, Any] | None, children: str) -> Sequence[Mapping[str, Any]]:
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [leaf for child in component[children] for leaf in _flatten(child, children)]


def _normaliser_keeps(component: Mapping[str, Any]) -> bool:
    match component:
        case {"type": "Prepend" | "ByteLevel"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return len(new.encode()) >= len(old.encode())
        case _:
            return False


def _pre_tokenizer_keeps(component: Mapping[str, Any]) -> bool:
    match component:
        case {"type": "ByteLevel" | "Digits" | "Metaspace" | "UnicodeScripts"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
        case _:
            return False
