"""Small tokenizers of each decoder kind, trained or listed on the spot."""

from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from app.text import Tokenizer
from tests.store_models import default_model_folder

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, 123 times.",
    "你好，世界。今天天气很好，我们去公园。",
    "Emoji: 😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 — naïve café",
    "def f(x):\n    return x + 1\n\n",
)


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: almost every Chinese character and emoji is several tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    library.add_tokens(["<tool_call>", "两字 plain", "ñandú"])
    return Tokenizer(library, special_tokens={"bos_token": "<|start|>", "eos_token": "<|end|>"})


@cache
def byte_fallback(strip: bool = True) -> Tokenizer:
    """Sentencepiece's kind: ▁ for spaces and <0xNN> for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "▁w", "▁▁", "你", "好", "▁你", "hell", "or"]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("▁", "▁"), ("▁", "你"), ("he", "ll"), ("o", "r")]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    library.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return Tokenizer(library, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@cache
def word_piece() -> Tokenizer:
    """A decoder without a byte table: spaces depend on the neighbours."""
    words = ["[UNK]", "[SEP]", "hello", "world", "token", "##ize", "##r", "##s", "你", "好", ",", ".", "'", "s", "😀"]
    library = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["[UNK]", "[SEP]"])
    return Tokenizer(library, special_tokens={"eos_token": "[SEP]"})


@cache
def metaspace() -> Tokenizer:
    """Another one: only the first token of a text loses its space."""
    words = ["<unk>", "▁", "▁hello", "▁world", "s", "▁▁", "▁你", "好", "lo", "</s>"]
    library = tokenizers.Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    return Tokenizer(library, special_tokens={"eos_token": "</s>"})


@cache
def default_model() -> Tokenizer:
    """The tokenizer that is served by default; skips the test where the model cannot be had."""
    return Tokenizer.load(default_model_folder().path)


def listed(decoder: Any) -> Tokenizer:
    """A few pieces and every byte under a decoder of the caller's, or none."""
    pieces = ["▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    library = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    if decoder is not None:
        library.decoder = decoder
    return Tokenizer(library, special_tokens={})


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that is there."""
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == token)
