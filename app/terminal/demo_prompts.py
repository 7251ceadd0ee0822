"""The demo's prompts: fixed, with seeds, half of them greedy and half sampled, in several scripts."""

from typing import NamedTuple


class DemoPrompt(NamedTuple):
    """One request of the demo, without model and length."""

    text: str
    temperature: float
    top_p: float
    seed: int


def demo_prompts() -> tuple[DemoPrompt, ...]:
    """All sixteen."""
    greedy, warm, hot = (0.0, 1.0), (0.8, 0.95), (1.0, 1.0)
    rows = (
        ("The sea is", greedy),
        ("Once upon a time, in a village by the river, there lived", warm),
        ("def fibonacci(n: int) -> int:\n    ", greedy),
        ("从前有一座山，山里有", warm),
        ("The three most important inventions of the nineteenth century are", hot),
        ("今天天气很好，我们", greedy),
        ("SELECT name, count(*) FROM orders", warm),
        ("🌍🚀✨ The rocket left at dawn, and", hot),
        ("Water boils at a lower temperature on a mountain because", greedy),
        ("你好！请介绍一下北京：", hot),
        ('{"name": "Ada", "born": 1815, "known_for": [', greedy),
        ("A recipe for bread:\n1. Take 500 g of flour.\n2.", warm),
        ("😀 😢 😡 🥳 These four faces mean", greedy),
        ("for (int i = 0; i < n; i++) {\n    ", hot),
        ("Dear neighbour, I am writing because your dog", hot),
        ("To be, or not to be, that is the question:\n", greedy),
    )
    return tuple(
        DemoPrompt(text, temperature, top_p, seed=7 + 11 * number)
        for number, (text, (temperature, top_p)) in enumerate(rows)
    )
