"""From a request, and perhaps a client's cursor, to a resumable stream: whether they belong together, and from where
each choice goes on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from app.api.answers import AnswerHead
from app.api.cursor import LAST_EVENT_ID, ChoiceCursor, Cursor, digest_of, ids_as_bytes
from app.api.errors import ResumeConflict
from app.api.kept import ChoiceRecord, KeptStreams
from app.api.portable import PortableStream, Source, Start, stream_key
from app.api.schemas.generation import GenerationRequest
from app.api.schemas.limits import MAX_RESUMABLE_CHOICES
from app.api.translate import PreparedGeneration, PreparedSequence, check_token_ids, reseed
from app.core.errors import InvalidRequest
from app.core.types import EngineLimits, EngineRequest

_IDS_FIELD = "stream_options.resume_token_ids"
_NOT_ASKED = frozenset(
    {"model", "prompt", "messages", "seed", "stream_options", "request_id", "priority", "cache_salt"}
)
"""Fields that the digest of the parameters leaves out: hashed otherwise, or without effect on what is said."""


def plan_stream(
    generation: PreparedGeneration,
    head: AnswerHead,
    *,
    limits: EngineLimits,
    kept: KeptStreams,
    last_event_id: str,
) -> PortableStream | None:
    """The stream as the request asks for it; None where it is not resumable.

    `last_event_id` is the client's cursor, empty where it begins. Raises InvalidRequest where it cannot be read, and
    ResumeConflict where it belongs to another server's model or another request.
    """
    request, sequences = generation.request, generation.sequences
    if not request.is_resumable:
        if last_event_id:
            raise InvalidRequest(
                f"`{LAST_EVENT_ID}` goes on with a resumable stream: send its request, with `stream_options` "
                '{"resumable": true}.',
                param=LAST_EVENT_ID,
            )
        return None
    _check_choices(len(sequences))
    new = Cursor(
        fingerprint=digest_of([limits.fingerprint.encode()]),
        prompts=_digest_of_prompts(sequences),
        parameters=_digest_of_parameters(request, sequences[0]),
        seed=generation.seed,
        created=head.created,
        request_id=head.request_id,
        choices=(None,) * len(sequences),
    )
    if not last_event_id:
        if request.stream_options is not None and request.stream_options.resume_token_ids:
            raise InvalidRequest(f"`resume_token_ids` needs the header `{LAST_EVENT_ID}`.", param=_IDS_FIELD)
        starts = [Start(sequence.engine_request, ChoiceRecord()) for sequence in sequences]
        return PortableStream(generation, head, cursor=new, starts=starts, kept=kept)
    cursor = Cursor.read(last_event_id)
    _check_same(cursor, new, request, fingerprint=limits.fingerprint)
    generation = reseed(generation, cursor.seed)
    record = kept.find(stream_key(generation, cursor))
    starts = [
        _start(
            sequence.engine_request,
            at,
            record=None if record is None else record.choices[sequence.index],
            handed_back=_handed_back(request, sequence.index, at, limits=limits),
        )
        for sequence, at in zip(generation.sequences, cursor.choices, strict=True)
    ]
    head = replace(head, request_id=cursor.request_id, created=cursor.created, seed=cursor.seed)
    return PortableStream(generation, head, cursor=cursor, starts=starts, kept=kept)


def _start(
    request: EngineRequest, at: ChoiceCursor | None, *, record: ChoiceRecord | None, handed_back: tuple[int, ...]
) -> Start:
    if at is None:
        return Start(request, ChoiceRecord())
    _check_possible(at, request)
    if at.is_finished:
        return Start(request, ChoiceRecord() if record is None else record.copy(), at)
    if request.params.num_prompt_logprobs is not None:  # the client has them
        request = msgspec.structs.replace(
            request, params=msgspec.structs.replace(request.params, num_prompt_logprobs=None)
        )
    if record is not None and record.knows(at.position):
        known = tuple(record.token_ids)
        return Start(
            msgspec.structs.replace(request, output_token_ids=known),
            record.copy(),
            at,
            Source.JOURNAL,
            replayed=known[: at.position],
            pending=record.since(at.position, request.request_id),
        )
    if handed_back or at.position == 0:
        request = msgspec.structs.replace(request, output_token_ids=handed_back)
        return Start(request, ChoiceRecord(handed_back), at, Source.TOKENS, replayed=handed_back)
    return Start(request, ChoiceRecord(), at, Source.DECODE)


def _handed_back(
    request: GenerationRequest, index: int, at: ChoiceCursor | None, *, limits: EngineLimits
) -> tuple[int, ...]:
    """The choice's tokens as the client has them; none where it does not say."""
    options = request.stream_options
    lists = None if options is None else options.resume_token_ids
    if not lists or index >= len(lists) or not lists[index]:
        return ()
    position = 0 if at is None else at.position
    if len(lists[index]) != position:
        raise InvalidRequest(
            f"`resume_token_ids` holds {len(lists[index])} ids of choice {index}, and `{LAST_EVENT_ID}` stands behind "
            f"{position}: send those of all events up to it.",
            param=_IDS_FIELD,
        )
    check_token_ids(lists[index], field=_IDS_FIELD, vocab_size=limits.vocab_size)
    return tuple(lists[index])


def _check_choices(count: int) -> None:
    if count > MAX_RESUMABLE_CHOICES:
        raise InvalidRequest(
            f"A resumable stream has at most {MAX_RESUMABLE_CHOICES} choices, and this one {count}: lower `n`, send "
            "fewer prompts, or leave `resumable` out.",
            param="stream_options.resumable",
        )


def _check_possible(at: ChoiceCursor, request: EngineRequest) -> None:
    """Whoever makes a cursor by hand gets no usage that no server says. Raises InvalidRequest."""
    num_prompt, most = len(request.prompt_token_ids), request.params.max_tokens
    wrong = None
    if at.position > most:
        wrong = f"stands behind {at.position} tokens; {most} were asked for"
    elif at.num_cached_tokens > num_prompt:
        wrong = f"is damaged: it tells of {at.num_cached_tokens} cached tokens of a prompt of {num_prompt}"
    elif at.num_reasoning_tokens > at.position:
        wrong = f"is damaged: it tells of {at.num_reasoning_tokens} tokens of reasoning among {at.position}"
    if wrong is not None:
        raise InvalidRequest(
            f"`{LAST_EVENT_ID}` {wrong}. Send the `id` of the stream's last event as it came.",
            param=LAST_EVENT_ID,
            code="invalid_cursor",
        )


def _check_same(cursor: Cursor, new: Cursor, request: GenerationRequest, *, fingerprint: str) -> None:
    """Raises ResumeConflict naming what differs."""
    wrong = None
    if cursor.fingerprint != new.fingerprint:
        wrong = (
            "fingerprint_differs",
            f"was made by a server whose system_fingerprint is another than this one's, {fingerprint}: what it would "
            "say next is another answer. Ask a replica of the server that began the stream",
        )
    elif cursor.prompts != new.prompts:
        wrong = ("prompt_differs", "belongs to a request with another prompt")
    elif cursor.parameters != new.parameters or len(cursor.choices) != len(new.choices):
        wrong = ("parameters_differ", "belongs to a request with other parameters, or a server with other defaults")
    elif request.seed is not None and request.seed != cursor.seed:
        wrong = ("seed_differs", f"belongs to a request with another seed, {cursor.seed}")
    if wrong is not None:
        raise ResumeConflict(f"`{LAST_EVENT_ID}` {wrong[1]}.", param=LAST_EVENT_ID, code=wrong[0])


def _digest_of_prompts(sequences: Sequence[PreparedSequence]) -> bytes:
    prompts = {sequence.prompt_index: sequence.prompt.token_ids for sequence in sequences}
    return digest_of(
        part for token_ids in prompts.values() for part in (ids_as_bytes([len(token_ids)]), ids_as_bytes(token_ids))
    )


def _digest_of_parameters(request: GenerationRequest, first: PreparedSequence) -> bytes:
    """Fields that are not given are left out, so that a server that knows more of them agrees."""
    fields: dict[str, Any] = {
        name: value
        for name in request.__struct_fields__
        if name not in _NOT_ASKED and (value := getattr(request, name)) is not None
    }
    options = request.stream_options
    usage = None if options is None else (bool(options.include_usage), bool(options.continuous_usage_stats))
    params = msgspec.structs.replace(first.engine_request.params, seed=0)
    data = msgspec.msgpack.encode((type(request).__name__, fields, usage, params), order="sorted")
    return digest_of([data])
