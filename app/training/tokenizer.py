"""Trains a byte-level BPE tokenizer and writes the files of it that a served model needs.

Ids 0 to 3 are the special tokens below, then 256 bytes, then merges. Every text has an encoding, and
decoding gives it back byte by byte. Encoding puts the start token first. Here, text that reads like a special token
is text; in the server, which renders templates, it is the token.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from app.core.errors import ConfigurationError

START, END = "<|startoftext|>", "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, START, TURN_START, TURN_END)
LEAST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer of at most `vocab_size` ids; fewer where the text holds no more pairs.

    Raises:
        ConfigurationError: the vocabulary has no room for the bytes.
    """
    if vocab_size < LEAST_VOCAB_SIZE:
        raise ConfigurationError(
            f"--vocab-size {vocab_size} has no room for 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"give at least {LEAST_VOCAB_SIZE}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    start = (START, tokenizer.token_to_id(START))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[start]),
        ]
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, *, chat_template: str = CHAT_TEMPLATE) -> None:
    """Write `TOKENIZER_FILES` into a folder that exists. Raises OSError where that fails."""
    # Not by its own `save`, which tells a full disk by a bare Exception.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json.

    Raises:
        ConfigurationError: it is missing, damaged, or not one of ours.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a bad file
        raise ConfigurationError(
            f"the tokenizer {path} cannot be read: {error}; make it with `headwater tokenizer`"
        ) from error
    for token in SPECIAL_TOKENS:
        special_id(tokenizer, token)
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    """The id of one of `SPECIAL_TOKENS`.

    Raises:
        ConfigurationError: the tokenizer is not one of ours.
    """
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ConfigurationError(f"the tokenizer has no {token}; make one with `headwater tokenizer`")
    return int(token_id)
