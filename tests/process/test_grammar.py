"""Grammars in a real engine process over the scripted runner, which takes the next id that a mask allows."""

import asyncio
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from app.core.config import EngineConfig
from app.core.types import EngineRequest, FinishReason, Grammar
from app.grammar import source
from app.text import Tokenizer
from tests.process.engines import IMPATIENT, Answer, complete, hurt, request, running, until, until_idle
from tests.text_tokenizers import byte_level

EOS = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 8, "maxLength": 12},
        "kind": {"enum": ["是", "否 🌍", None]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "kind", "counts"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_level()._library.save(str(folder / "tokenizer.json"))
    return folder


def config(model_dir: Path, *, num_kv_blocks: int = 1024, **settings: float | int | str) -> EngineConfig:
    scripted = {"vocab_size": byte_level().vocab_size + 5, **settings}
    return EngineConfig(
        model_dir=str(model_dir),
        tier="scripted",
        eos_token_ids=(EOS,),
        num_kv_blocks=num_kv_blocks,
        scripted=scripted,
    )


def constrained(request_id: str, grammar: Grammar, *, max_tokens: int = 300, **params: object) -> EngineRequest:
    """A sampled request: its tokens depend on its id."""
    plain = request(request_id, max_tokens=max_tokens, temperature=1.0)
    return msgspec.structs.replace(plain, params=msgspec.structs.replace(plain.params, grammar=grammar, **params))


def text_of(answer: Answer, tokenizer: Tokenizer | None = None) -> str:
    return (tokenizer or byte_level()).decode(answer.token_ids)


def is_valid(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "kind", "counts"]
        and 8 <= len(value["name"]) <= 12
        and value["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
        and 2 <= len(value["counts"]) <= 3
    )


async def test_each_kind_of_grammar_holds_its_output(model_dir: Path) -> None:
    async with running(config(model_dir)) as client:
        schema, pattern, option, lark = await asyncio.gather(
            complete(client, constrained("schema", source.json_schema(SCHEMA))),
            complete(client, constrained("regex", source.regex(r"[A-F]{3}-\d{2}(是|🌍)"))),
            complete(client, constrained("choice", source.choice(['a "quoted" one', "b|c\n", "两 🌍"]))),
            complete(client, constrained("lark", source.lark('start: "<" NAME ">"\nNAME: /[a-z]{4}/'))),
        )
        await until_idle(client)
    assert [answer.finish_reason for answer in (schema, pattern, option, lark)] == [FinishReason.STOP] * 4
    assert is_valid(text_of(schema))
    assert text_of(pattern)[-1] in "是🌍" and text_of(pattern)[3] == "-" and len(text_of(pattern)) == 7
    assert text_of(option) in ('a "quoted" one', "b|c\n", "两 🌍")
    assert text_of(lark)[0] + text_of(lark)[-1] == "<>" and len(text_of(lark)) == 6


async def test_a_grammar_waits_for_the_end_of_reasoning(model_dir: Path) -> None:
    """`<tool_call>` stands for that end. Before it nothing is held to the grammar, and the output does not end."""
    closing = byte_level().token_id("<tool_call>")
    assert closing is not None
    waiting = msgspec.structs.replace(source.json_schema(SCHEMA), after=closing)
    before = (*byte_level().encode_now("Hm 好", False), closing)
    behind = msgspec.structs.replace(constrained("behind", waiting), output_token_ids=before)
    async with running(config(model_dir)) as client:
        inside, answer = await asyncio.gather(
            complete(client, constrained("inside", waiting, max_tokens=20)), complete(client, behind)
        )
        await until_idle(client)
    assert (inside.finish_reason, len(inside.token_ids)) == (FinishReason.LENGTH, 20) and EOS not in inside.token_ids
    assert answer.finish_reason is FinishReason.STOP and is_valid(text_of(answer))


async def test_other_ends_beside_a_grammar(model_dir: Path) -> None:
    """A stop token ends the output where the grammar lets it be drawn; without EOS the grammar's own end is the end."""
    letters = source.regex("[ab]{30,40}")
    stop = byte_level().encode_now("a", False)[0]
    async with running(config(model_dir)) as client:
        stopped, whole, other = await asyncio.gather(
            complete(client, constrained("stopped", letters, stop_token_ids=(stop,))),
            complete(client, constrained("whole", letters, ignore_eos=True)),
            complete(client, constrained("other", letters, stop_token_ids=(EOS + 2,))),
        )
        await until_idle(client)
    assert stopped.finish_reason is FinishReason.STOP and stopped.token_ids[-1] == stop
    assert 0 < len(text_of(stopped)) < 30 and set(text_of(stopped)[:-1]) <= {"b"}
    assert whole.finish_reason is FinishReason.STOP and len(text_of(whole)) == 40
    assert other.finish_reason is FinishReason.STOP and 30 <= len(text_of(other)) <= 40


async def test_a_kill_in_the_middle_changes_nothing(model_dir: Path) -> None:
    asked = [constrained(f"r{index}", source.json_schema(SCHEMA)) for index in range(6)]
    async with running(config(model_dir)) as client:
        expected = await asyncio.gather(*(complete(client, each) for each in asked))
    async with running(config(model_dir, step_seconds=0.004)) as client:
        answers = [Answer() for _ in asked]
        tasks = [asyncio.create_task(a.fill(client, each)) for a, each in zip(answers, asked, strict=True)]
        for generation, num_tokens in ((1, 8), (2, 20)):
            await until(lambda least=num_tokens: min(len(a.token_ids) for a in answers) >= least)  # type: ignore[misc]
            hurt(client, signal.SIGKILL)
            await until(lambda dead=generation: client.status.generation > dead)  # type: ignore[misc]
        await asyncio.gather(*tasks)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers)
    assert all(is_valid(text_of(answer)) for answer in answers)
    assert {answer.finish_reason for answer in answers} == {FinishReason.STOP}


async def test_plain_rows_do_not_notice_constrained_ones(model_dir: Path) -> None:
    plain = [request(f"p{index}", max_tokens=60, temperature=1.0, num_logprobs=1) for index in range(4)]
    grammars = [constrained(f"g{index}", source.json_schema(SCHEMA)) for index in range(4)]
    async with running(config(model_dir)) as client:
        alone = await asyncio.gather(*(complete(client, each) for each in plain))
    async with running(config(model_dir)) as client:
        mixed = await asyncio.gather(*(complete(client, each) for each in (*plain, *grammars)))
    assert [answer.token_ids for answer in mixed[:4]] == [answer.token_ids for answer in alone]
    assert all(is_valid(text_of(answer)) for answer in mixed[4:])


async def test_preemption_keeps_the_grammar(model_dir: Path) -> None:
    asked = [constrained(f"r{index}", source.json_schema(SCHEMA)) for index in range(8)]
    async with running(config(model_dir)) as client:
        expected = await asyncio.gather(*(complete(client, each) for each in asked))
    async with running(config(model_dir, num_kv_blocks=16)) as client:
        answers = await asyncio.gather(*(complete(client, each) for each in asked))
        step = client.status.last_step
        assert step is not None and step.total_preemptions > 0
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


async def test_a_grammar_that_fails_ends_its_sequence_alone(model_dir: Path) -> None:
    explosive = source.regex("((a{1,100}){1,100}){1,100}")  # some tokens on, it has too many ways to go on
    async with running(config(model_dir)) as client:
        broken, limited, fine = await asyncio.gather(
            complete(client, constrained("broken", Grammar(source.lark("start: x").kind, "start: x"))),
            complete(client, constrained("limited", explosive)),
            complete(client, constrained("fine", source.regex("[a-c]{5}"))),
        )
        assert client.status.generation == 1
        await until_idle(client)
    assert broken.finish_reason is limited.finish_reason is FinishReason.ERROR
    assert "unknown name" in str(broken.outputs[-1].error)
    assert "limits" in str(limited.outputs[-1].error) and "too many expressions" in str(limited.outputs[-1].error)
    assert len(limited.token_ids) > 5
    assert fine.finish_reason is FinishReason.STOP and len(text_of(fine)) == 5


async def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as client:
        answer = await complete(client, constrained("a", source.regex("a")))
        assert answer.finish_reason is FinishReason.ERROR
        assert "tokenizer" in str(answer.outputs[-1].error)


async def test_an_engine_that_only_prepares_a_grammar_does_not_hang(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    os.mkfifo(tokenizer)  # the preparation waits for somebody to write it
    supervision = msgspec.structs.replace(IMPATIENT, hang_seconds=0.3)
    async with running(config(tmp_path), supervision=supervision) as client:
        task = asyncio.create_task(complete(client, constrained("a", source.regex("[a-c]{5}"))))
        await asyncio.sleep(1.5)
        assert (client.status.generation, client.status.is_stalled) == (1, False)
        await asyncio.to_thread(tokenizer.write_bytes, byte_level()._library.to_str().encode())
        answer = await task
        assert client.status.generation == 1
    assert len(text_of(answer)) == 5


async def test_where_a_grammar_ends(model_dir: Path) -> None:
    digits = source.regex("[0-9]{2,}")
    async with running(config(model_dir, eos_after=4)) as client:
        ended, cut, full, least, ignored = await asyncio.gather(
            complete(client, constrained("a1", digits)),
            complete(client, constrained("b1", source.json_schema(SCHEMA), max_tokens=9)),
            complete(client, constrained("c1", source.regex("[0-9]{9}"), max_tokens=9)),
            complete(client, constrained("d1", digits, min_tokens=7, max_tokens=20)),
            complete(client, constrained("e1", source.regex("[0-9]{2,6}"), ignore_eos=True)),
        )
    assert ended.finish_reason is FinishReason.STOP and ended.token_ids[4:] == [EOS]  # the script's wish
    assert cut.finish_reason is FinishReason.LENGTH and len(cut.token_ids) == 9
    assert full.finish_reason is FinishReason.STOP  # complete with the last token that it may have
    assert least.finish_reason is FinishReason.LENGTH and EOS not in least.token_ids
    assert ignored.finish_reason is FinishReason.STOP and text_of(ignored).isdigit()
    assert EOS not in ignored.token_ids


async def test_an_abort_while_it_is_prepared_or_runs_leaves_nothing(model_dir: Path) -> None:
    async with running(config(model_dir, step_seconds=0.002)) as client:
        streams = [client.generate(constrained(f"r{index}", source.json_schema(SCHEMA))) for index in range(4)]
        first = [asyncio.ensure_future(anext(stream)) for stream in streams]
        for task in first[:2]:
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        await until_idle(client)
        again = await complete(client, constrained("r0", source.json_schema(SCHEMA)))
        assert is_valid(text_of(again))
