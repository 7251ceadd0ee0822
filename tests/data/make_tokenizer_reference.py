"""Makes tokenizer_tiny.json and tokenizer_reference_ids.json: token ids as llama.cpp gives them.

    python -m tests.data.make_tokenizer_reference LLAMA_TOKENIZE MODEL.gguf

LLAMA_TOKENIZE is llama.cpp's program (`cmake --build build --target llama-tokenize`), MODEL.gguf the file
of the default model. Two sets of ids:
- `default_model`: the real vocabulary, on every text;
- `tiny`: for each `tokenizer.ggml.pre` that is accepted, a small vocabulary whose merges were learnt without
  any cut, so that they reach across digits, blanks, line ends and signs: a wrong cut shows in the ids;
- `sentencepiece`: a small vocabulary of that kind, which lacks many characters and so needs its byte tokens.
Every answer is decoded back to the text before it is written.
"""

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from app.store.gguf_file import read_gguf
from app.store.gguf_tokenizer import PRE_TOKENIZERS
from tests.gguf_maker import byte_alphabet, sentencepiece_fields, tokenizer_fields, write_gguf

TEXTS = (
    "Hello, world!",
    "List:\n\n1. a\n2. b\n\n\n10. c",
    "The year 2024 had 366 days; 1,234,567.89 and 0x1F.",
    "12345678901234567890",
    "3½ cups, x² + y³, Ⅷ, ٣٤٥, 一二三 123",
    "def f(x):\n    if x > 0:\n        return x ** 2\n\treturn -x\n",
    "  leading and trailing spaces   ",
    "tabs\t\tand\t spaces \t mixed",
    "\n\n\n",
    " \n \n  \n",
    "line one\r\nline two\r\n\r\nline three",
    "a\n b\n  c\n   d\n    e",
    "I'm sure they've said it's what we'd do; he'll see, don't they're. I'M IT'S WE'LL",
    "'s 't 're 've 'm 'll 'd 'S 'T",
    "can’t won’t “quoted” — dash… ellipsis",
    "😀 emoji 👩‍👩‍👧‍👦 family 🇨🇳 flag 👍🏽",
    "你好，世界！今天是2024年5月1日。",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 문장입니다. 안녕하세요?",
    "Привет, мир! Это тест 42.",
    "مرحبا بالعالم ١٢٣",
    "हिन्दी में पाठ १२३",
    "ภาษาไทย ทดสอบ",
    "https://example.com/a?b=1&c=2#frag user@example.org",
    '{"key": [1, 2.5, true, null], "k2": "v\\n"}',
    '<div class="a">text</div> <!-- comment -->',
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "for(int i=0;i<10;++i){a[i]+=i*2;}",
    "CamelCaseWord snake_case_word kebab-case-word SCREAMING_CASE",
    "!!! ??? ... ### $$$ %%% ^^^ &&& *** ((( )))",
    "a  b   c    d     e",
    "no-break\u00a0space\u3000ideographic\u2009thin\u200bzero",
    "e.g. 5kg, 10%, $100, €50, 3.14e-10",
    "x",
    " ",
    "\t",
    "1",
    " 1 22 333 4444",
    "a1b22c333",
    "<|im_start|>user\nHi 5 times<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>more <|im_end|>",
    "The capital of France is",
)
HERE = Path(__file__).parent


def main(llama_tokenize: str, model: Path) -> None:
    """Write both files."""
    tiny = train_tiny()
    reference: dict[str, object] = {"texts": TEXTS}
    metadata = read_gguf(model).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    reference["default_model"] = [
        ids_of(llama_tokenize, model, text, [str(token) for token in tokens]) for text in TEXTS
    ]
    by_pre: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            path = Path(folder) / f"{pre}.gguf"
            write_gguf(path, {"general.architecture": "llama", **LLAMA_FIELDS, **tokenizer_fields(tiny, pre=pre)}, {})
            by_pre[pre] = [ids_of(llama_tokenize, path, text, tiny["tokens"]) for text in TEXTS]
        pieces = train_sentencepiece()
        tiny["sentencepiece"] = pieces
        path = Path(folder) / "sentencepiece.gguf"
        write_gguf(path, {"general.architecture": "llama", **LLAMA_FIELDS, **sentencepiece_fields(pieces)}, {})
        reference["sentencepiece"] = [ids_of(llama_tokenize, path, text, pieces) for text in TEXTS]
    write_json(HERE / "tokenizer_tiny.json", tiny)
    reference["tiny"] = by_pre
    write_json(HERE / "tokenizer_reference_ids.json", reference)


LLAMA_FIELDS: dict[str, object] = {
    "llama.context_length": 128,
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.feed_forward_length": 8,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def train_tiny() -> dict[str, list[str]]:
    """A byte-level vocabulary with merges across every kind of boundary: tokens and merges, as GGUF has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 700, min_frequency=1, initial_alphabet=alphabet, max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([text for text in TEXTS if "<|" not in text] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {"tokens": [*special, *learnt], "merges": [" ".join(pair) for pair in model["merges"]]}


def train_sentencepiece() -> list[str]:
    """Unknown, start and end, the bytes, the pieces with the best first."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, limit_alphabet=90, max_token_length=8, show_progress=False
    )
    texts = ["\u2581" + text.replace(" ", "\u2581") for text in TEXTS if "<|" not in text]
    tokenizer.train_from_iterator(texts * 2, trainer)
    vocab = tokenizer.get_vocab()
    letters = [piece for piece in sorted(vocab, key=vocab.__getitem__) if len(piece) == 1]
    pieces = [piece for piece in sorted(vocab, key=vocab.__getitem__) if len(piece) > 1]
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]


def ids_of(llama_tokenize: str, model: Path, text: str, tokens: list[str]) -> list[int]:
    """llama.cpp's ids of one text, after checking that they spell it."""
    with tempfile.NamedTemporaryFile("wb", suffix=".txt") as file:
        file.write(text.encode())
        file.flush()
        command = [llama_tokenize, "-m", str(model), "-f", file.name, "--ids", "--no-escape", "--log-disable"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    ids = [int(token_id) for token_id in ast.literal_eval(result.stdout.strip().splitlines()[-1])]
    spelt = spell(ids, tokens)
    if spelt not in (text.encode(), b"<|im_start|>" + text.encode(), b" " + text.encode()):
        raise SystemExit(f"llama.cpp's ids of {text!r} spell {spelt!r}")
    return ids


def spell(ids: list[int], tokens: list[str]) -> bytes:
    """The bytes of token ids of a byte-level vocabulary."""
    if "<0x00>" in tokens:
        pieces = [tokens[token_id] for token_id in ids if token_id > 2]
        return b"".join(
            bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("\u2581", " ").encode()
            for piece in pieces
        )
    value = {character: byte for byte, character in enumerate(byte_alphabet())}
    parts = (tokens[token_id] for token_id in ids)
    return b"".join(part.encode() if part.startswith("<|") else bytes(value[c] for c in part) for part in parts)


def write_json(path: Path, content: dict[str, object] | dict[str, list[str]]) -> None:
    """One line a list of the second level, so that a change can be read."""
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
