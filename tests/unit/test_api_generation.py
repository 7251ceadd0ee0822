"""A request that fails after it was admitted gives its places back, wherever it fails."""

from typing import Any

import pytest

from app.api import generation
from app.api.deadline import Deadline
from app.api.deps import ServerContext
from app.api.generation import GenerationAnswer, Prepared
from app.api.record import RequestRecord
from app.api.schemas.completions import CompletionRequest
from app.api.sequence_text import SequenceText
from app.api.translate import prepare_completion
from tests.contract.fake_engine import FakeEngine, fake_limits
from tests.contract.serving import make_context
from tests.text_tokenizers import byte_level


def fail(*_args: Any, **_options: Any) -> Any:
    raise ArithmeticError


async def answer(context: ServerContext) -> None:
    limits = fake_limits(vocab_size=context.tokenizer.vocab_size)
    prepared = await prepare_completion(CompletionRequest(prompt=["a", "b"], n=2), context, limits=limits)
    record = RequestRecord("r")
    deadline = Deadline(arrived=record.arrived, total=None, queue=None, on_expiry=fail)
    prepared_answer = Prepared(prepared, "m", make_form=fail)
    GenerationAnswer(prepared_answer, context, limits=limits, record=record, deadline=deadline, ignored=())


@pytest.mark.parametrize("num_good", [0, 3, 4])
async def test_places_are_given_back_where_a_form_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    tokenizer = byte_level()
    context = make_context(FakeEngine((5,), fake_limits(vocab_size=tokenizer.vocab_size)), tokenizer=tokenizer)
    made: list[object] = []

    def make_text(*args: Any, **options: Any) -> SequenceText:
        if len(made) == num_good:
            fail()
        made.append(None)
        return SequenceText(*args, **options)

    monkeypatch.setattr(generation, "SequenceText", make_text)
    with pytest.raises(ArithmeticError):
        await answer(context)
    assert (context.admission.num_live_sequences, context.admission.num_waiting_tokens) == (0, 0)
