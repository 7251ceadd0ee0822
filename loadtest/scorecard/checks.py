"""The checks of what is on the wire. Each takes a running server and leaves it as it was.

They ask only through the public API, in the fields that OpenAI's client and vLLM's users send, and judge what came
back against what the server itself said elsewhere: no reference answers are needed, so any model can be served.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from loadtest.scorecard.finding import Finding, Verdict, counted
from loadtest.scorecard.target import Answer, Target

PROMPTS = (
    "The history of lighthouses begins",
    "A list of things to pack for a week in the mountains:\n1.",
    "def fibonacci(n):\n",
    "今天天气很好，我们一起去",
    "请用中文介绍一下北京的历史：",
    "List five emoji: 😀 🎉",
    "Once upon a time there was a small robot who",
    "The capital of France is",
)
TEXT_PROMPTS = PROMPTS[:3] + PROMPTS[6:]
REPETITIVE = "a b a b a b a b a b a b"

Check = Callable[[Target], Awaitable[Finding]]


async def fields_are_honoured(target: Target) -> Finding:
    """Fields that would change the answer change it, or are refused, or are named as ignored."""
    plain = await target.complete(REPETITIVE, 24)
    if plain.status != 200:
        return Finding("fields", Verdict.NOT_RUN, f"a plain completion fails: {plain.error}")

    def changed(answer: Answer) -> bool:
        return answer.text != plain.text

    probes: dict[str, tuple[dict[str, object], Callable[[Answer], bool]]] = {
        "stop": ({"stop": [plain.text[4:6] or "b"]}, changed),
        "n": ({"n": 2, "temperature": 1.0}, lambda answer: answer.num_choices == 2),
        "echo": ({"echo": True}, lambda answer: answer.text.startswith(REPETITIVE)),
        "logprobs": ({"logprobs": 2}, lambda answer: bool(answer.logprobs)),
        "logit_bias": ({"logit_bias": {"60": 100}}, changed),
        "presence_penalty": ({"presence_penalty": 2.0}, changed),
        "frequency_penalty": ({"frequency_penalty": 2.0}, changed),
        "suffix": ({"suffix": " the end"}, changed),
        "best_of": ({"best_of": 3, "n": 1}, lambda answer: False),
        "response_format": (
            {"response_format": {"type": "json_object"}},
            lambda answer: answer.text.lstrip().startswith("{"),
        ),
        "a field nobody knows": ({"zz_unknown_field": 1}, lambda answer: False),
        "a misspelt field": ({"max_token": 3}, lambda answer: False),
    }
    ignored = []
    for name, (fields, is_honoured) in probes.items():
        answer = await target.complete(REPETITIVE, 24, **fields)
        is_told = any(next(iter(fields)) in value for value in answer.headers.values())
        if answer.status == 200 and not is_honoured(answer) and not is_told:
            ignored.append(name)
    good = len(probes) - len(ignored)
    return counted("fields", good, len(probes), "fields honoured, refused or reported", bad=", ".join(ignored))


async def nonsense_is_refused(target: Target) -> Finding:
    """Requests that mean nothing get a 4xx, and the server goes on."""
    prompt = "Hello"
    bodies: dict[str, dict[str, object] | bytes] = {
        "max_tokens -1": target.body(prompt, -1),
        "temperature 'hot'": target.body(prompt, temperature="hot"),
        "temperature -1": target.body(prompt, temperature=-1),
        "top_p 7": target.body(prompt, top_p=7),
        "n 0": target.body(prompt, n=0),
        "logprobs 1000": target.body(prompt, logprobs=1000),
        "prompt {}": target.body({}),
        "token id -5": target.body([-5]),
        "token id 10^9": target.body([10**9]),
        "broken JSON": b'{"prompt": "a"',
        "NaN": b'{"model": "%b", "prompt": "a", "temperature": NaN}' % str(target.model).encode(),
        "an unknown model": target.body(prompt) | {"model": "no-such-model"},
    }
    wrong = []
    for name, body in bodies.items():
        answer = await target.post(body)
        if not 400 <= answer.status < 500:
            wrong.append(f"{name} ({answer.status or answer.error})")
    alive = await target.answers_within(30.0)
    if alive is None:
        return Finding("nonsense", Verdict.FAIL, "the server answers no more afterwards")
    return counted("nonsense", len(bodies) - len(wrong), len(bodies), "refused with 4xx", bad=", ".join(wrong))


async def stops_do_not_leak(target: Target) -> Finding:
    """Text up to a stop string and nothing of it, whole and streamed, wherever tokens and events cut it."""
    good, total, bad = 0, 0, []
    for prompt in PROMPTS:
        text = (await target.complete(prompt, 32)).text
        for start, length in ((len(text) // 3, 2), (len(text) // 2, 5)):
            stop = text[start : start + length]
            if len(stop) < length or not stop.strip() or "\ufffd" in stop:
                continue
            expected = text[: text.index(stop)]
            whole = await target.complete(prompt, 32, stop=[stop])
            streamed = await target.stream(prompt, 32, stop=[stop])
            for answer in (whole, streamed):
                total += 1
                if answer.text == expected and answer.finish_reason == "stop":
                    good += 1
                else:
                    bad.append(repr(stop))
    return counted("stop strings", good, total, "answers cut exactly", bad=", ".join(dict.fromkeys(bad)))


async def characters_stay_whole(target: Target) -> Finding:
    """No event of a stream holds a piece of a character."""
    good, total = 0, 0
    for prompt in PROMPTS[3:6]:
        for seed in range(2):
            fields = {"temperature": 0.8, "seed": seed}
            answer = await target.stream(prompt, 48, **fields)
            total += 1
            # The last piece may show that the token limit cut a character: nothing can mend that.
            good += answer.is_whole and not any("\ufffd" in piece for piece in answer.pieces[:-2])
    return counted("characters", good, total, "streams without a split character")


async def streams_equal_answers(target: Target) -> Finding:
    """The joined stream is the answer that comes without streaming."""
    good = 0
    for prompt in PROMPTS:
        whole, streamed = await target.complete(prompt, 40), await target.stream(prompt, 40)
        good += bool(whole.text) and whole.text == streamed.text and whole.finish_reason == streamed.finish_reason
    return counted("stream = answer", good, len(PROMPTS), "texts equal")


async def seeds_repeat(target: Target) -> Finding:
    """The same seed gives the same text, another seed gives others."""
    good, texts = 0, set()
    for seed, prompt in enumerate(TEXT_PROMPTS):
        fields = {"temperature": 1.0, "seed": seed}
        first, second = [(await target.complete(prompt, 32, **fields)).text for _ in range(2)]
        other = (await target.complete(prompt, 32, temperature=1.0, seed=seed + 1000)).text
        texts.add(other == first)
        good += bool(first) and first == second
    if texts == {True}:
        return Finding("seeds", Verdict.FAIL, "another seed gives the same text")
    return counted("seeds", good, len(TEXT_PROMPTS), "texts repeated")


async def rows_are_rows(target: Target) -> Finding:
    """What a request says does not depend on the others in its batch."""
    asked = [(f"{prompt} {index}", index) for index, prompt in enumerate((*TEXT_PROMPTS, *TEXT_PROMPTS, *TEXT_PROMPTS))]

    async def one(prompt: str, seed: int) -> str:
        return (await target.complete(prompt, 48, temperature=0.9, seed=seed)).text

    alone = [await one(prompt, seed) for prompt, seed in asked]
    together = await asyncio.gather(*(one(prompt, seed) for prompt, seed in asked))
    good = sum(bool(a) and a == b for a, b in zip(alone, together, strict=True))
    return counted("rows", good, len(asked), "texts the same alone and in company")


async def usage_is_true(target: Target) -> Finding:
    """Token counts agree: with the limit that was reached, with the stream, with the tokens of n choices."""
    good, total, bad = 0, 0, []

    def expect(name: str, is_right: bool) -> None:
        nonlocal good, total
        total, good = total + 1, good + is_right
        if not is_right:
            bad.append(name)

    for prompt in PROMPTS[:4]:
        whole, streamed = await target.complete(prompt, 24), await target.stream(prompt, 24)
        usage, final = whole.usage or {}, streamed.usage or {}
        if whole.finish_reason == "length":
            expect("completion_tokens at the limit", usage.get("completion_tokens") == 24)
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        expect("usage of the stream", all(usage.get(key) == final.get(key) is not None for key in counts))
        expect("the sum", usage.get("total_tokens") == sum(usage.get(key) or 0 for key in counts[:2]))
    several = await target.complete("The capital of France is", 8, n=3, temperature=1.0, seed=1, ignore_eos=True)
    if several.status == 200 and several.num_choices == 3:
        expect("completion_tokens of n choices", (several.usage or {}).get("completion_tokens") == 24)
    return counted("usage", good, total, "counts right", bad=", ".join(dict.fromkeys(bad)))


async def gauges_fall_back(target: Target) -> Finding:
    """After 16 clients hang up in the middle, nothing counts as running within five seconds."""
    if await target.gauges() is None:
        return Finding("aborts", Verdict.NOT_RUN, "no gauges of running requests at /metrics")

    async def hang_up(index: int) -> None:
        body = target.body(f"Tell a long story about the number {index}.", 800, stream=True, ignore_eos=True)
        with contextlib.suppress(Exception):
            async with target.open(body) as response:
                async for _ in response.aiter_bytes():
                    return

    await asyncio.gather(*map(hang_up, range(16)))
    for _ in range(50):
        gauges = await target.gauges()
        if gauges is not None and not any(gauges.values()):
            return Finding("aborts", Verdict.PASS, "16 of 16 streams freed within 5 s")
        await asyncio.sleep(0.1)
    return Finding("aborts", Verdict.FAIL, f"still counted after 5 s: {gauges}")
