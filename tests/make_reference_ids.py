"""Makes tests/data/reference_ids.json: what `transformers.generate` says in float32, greedily, to many prompts.

    python -m tests.make_reference_ids

Takes a few minutes on one core. The file changes only when the prompts, the model's conversion or its
tokenizer change; the test that reads it then says which prompts differ.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from app.store import resolve
from app.text.tokenizer import Tokenizer

MODEL = "smollm2-135m-instruct-q4"
TARGET = Path(__file__).parent / "data" / "reference_ids.json"
NUM_TOKENS = 32
NOTED_MARGIN = 1e-2
"""Output tokens are listed with the distance of the two best logits where it is under this."""

_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "List three fruits and their colours.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish, French and German.",
    "Summarise the water cycle.",
    "What is 12 + 30?",
    "Name the planets of the solar system in order.",
    "你好！请介绍一下你自己。",
    "什么是机器学习？",
    "Reply only with emoji: 🎉🚀",
    "What does this mean: 🌧️ ➡️ 🌈?",
    "Write a Python function that reverses a string.",
    "Count from 1 to 20.",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog. The",
    "Once upon a time, in a land far away,",
    "In 1969, the first human",
    "The three laws of thermodynamics are",
    "To be, or not to be, that is",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the largest ocean?\nA:",
    "A",
    " ",
    "\n\n",
    "List:\n\n1. apples\n2. pears\n3.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12",
    "3.14159265358979",
    "2, 4, 8, 16, 32, 64,",
    "Phone: +1 (555) 010-9999, room 42B, 2026-11-24 08:15:00\n",
    "| name | age |\n|------|-----|\n| Ann  | 31  |\n|",
    '{"id": 17, "tags": ["a", "b"], "nested": {"x":',
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "<html>\n  <body>\n    <h1>Hello</h1>\n",
    "import numpy as np\n\nx = np.arange(10)\nprint(x[::2])  #",
    "fn main() {\n\tlet mut total = 0;\n\tfor i in 0..100 {\n",
    "你好，世界！今天天气",
    "从前有座山，山里有座庙，庙里",
    "人工智能是计算机科学的一个分支，它",
    "北京是中国的首都，上海是",
    "1、2、3、4、5，上山打老虎。",
    "日本語のテキストも少し。今日は",
    "Привет, мир! Сегодня",
    "مرحبا بالعالم",
    "안녕하세요, 세계!",
    "Ça va? Où est la bibliothèque, s'il vous plaît? Naïve façade, œuvre:",
    "🎉🎊🥳 Happy birthday! 🎂",
    "😀😃😄😁😆😅🤣😂",
    "👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb:",
    "mixed 混合 🍜 text テキスト 42 ½ → ∞ ≠ √2:",
    "    indented\n\t\ttabs and   spaces   \n",
    "AAAAAAAAAAAAAAAAAAAAAAAA",
    "ha ha ha ha ha ha ha",
)
LONG = "The history of the lighthouse goes back many centuries. " * 12 + "In the end, the keeper"


def prompts() -> list[str]:
    return [_CHAT.format(question) for question in QUESTIONS] + [*TEXTS, LONG, LONG + " said that"]


def make() -> None:
    torch.set_num_threads(1)
    folder = resolve(MODEL, report=print)
    tokenizer = Tokenizer.load(folder.path)
    model = AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    model.generation_config.eos_token_id = None  # answers go on to their length
    entries = [_entry(model, tokenizer.encode_now(text), text) for text in prompts()]
    content = {"model": MODEL, "revision": folder.revision, "num_tokens": NUM_TOKENS, "prompts": entries}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    TARGET.write_text(re.sub(r"\s*\n\s{3,}(?=[-\d\]\[.])", " ", text) + "\n", encoding="utf-8")


def _entry(model: Any, prompt: list[int], text: str) -> dict[str, Any]:
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(generated.logits).topk(2).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    return {
        "text": text,
        "prompt": prompt,
        "output": generated.sequences[0, len(prompt) :].tolist(),
        "margins": {str(at): margin for at, margin in enumerate(margins) if margin < NOTED_MARGIN},
    }


if __name__ == "__main__":
    make()
