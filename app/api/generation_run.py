"""From one generating request's bytes to its answer: body, deadline, the key's share, what the endpoint makes of it.

Everything that can be wrong with a request is found here, while nothing has been asked of the engine.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.aside import aside
from app.api.body import ClientDisconnected, check_headers, read_body
from app.api.cursor import LAST_EVENT_ID
from app.api.deadline import HEADER as DEADLINE_HEADER
from app.api.deadline import Deadline, read_deadline
from app.api.deps import ServerContext
from app.api.disconnect import run_until_disconnect
from app.api.generation import GenerationAnswer, Prepared
from app.api.record import RequestRecord
from app.api.schemas.decode import decode_keys
from app.api.schemas.field_rules import FieldTable, UnknownFields
from app.api.share import Share
from app.core.types import EngineLimits, EngineRequest


class Endpoint(Protocol):
    """What is one endpoint's own."""

    @property
    def table(self) -> FieldTable: ...

    async def prepare(
        self,
        body: bytes,
        fields: Mapping[str, msgspec.Raw],
        context: ServerContext,
        *,
        limits: EngineLimits,
        tenant: str,
        unknown: UnknownFields,
    ) -> Prepared:
        """Check the body and turn it into sequences. Raises ClientError."""
        ...


class GenerationRun(Response):
    """The response object of one generating request; it reads the body itself."""

    def __init__(self, context: ServerContext, endpoint: Endpoint) -> None:
        self.background = None
        self._context = context
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. Errors before the first byte are raised, later ones become an event."""
        context, record = self._context, RequestRecord.of(scope)
        context.ready_limits()
        deadline = self._deadline(scope, record)
        with ExitStack() as parsing:
            check_headers(scope, context.limits)
            context.admission.check_wait(record.share)
            room = parsing.enter_context(context.admission.enter(record.share))
            try:
                body = await read_body(receive, context.limits, room=room)
            except ClientDisconnected:
                return
            last_event_id = Headers(scope=scope).get(LAST_EVENT_ID, "")
            serving = self._serve(body, record, send, parsing=parsing, deadline=deadline, last_event_id=last_event_id)
            del body  # a long answer must not hold it
            await run_until_disconnect(receive, serving)

    def _deadline(self, scope: Scope, record: RequestRecord) -> Deadline:
        limits, metrics = self._context.limits, self._context.metrics
        asked = read_deadline(Headers(scope=scope).get(DEADLINE_HEADER))
        given = [seconds for seconds in (asked, limits.request_timeout) if seconds is not None]
        return Deadline(
            arrived=record.arrived,
            total=min(given, default=None),
            queue=limits.queue_timeout,
            on_expiry=metrics.count_timeout,
        )

    async def _serve(
        self,
        body: bytes,
        record: RequestRecord,
        send: Send,
        *,
        parsing: ExitStack,
        deadline: Deadline,
        last_event_id: str,
    ) -> None:
        """Turn the body into an answer and send it. `parsing` is closed once the body is no longer held."""
        context, table = self._context, self._endpoint.table
        limits = context.ready_limits()
        unknown = table.unknown if context.limits.unknown_fields is None else context.limits.unknown_fields
        async with deadline.hold():
            fields, ignored = await aside(len(body), _read_fields, body, table, unknown=unknown)
            prepared = await self._endpoint.prepare(
                body, fields, context, limits=limits, tenant=record.tenant, unknown=unknown
            )
        ignored += prepared.ignored
        if _claims_more(prepared, record.share):
            ignored += ("priority",)
        answer = GenerationAnswer(
            _in_share(prepared, record.share),
            context,
            limits=limits,
            record=record,
            deadline=deadline,
            ignored=ignored,
            last_event_id=last_event_id,
        )
        del body, fields
        parsing.close()
        await answer.send(send)


def _read_fields(
    body: bytes, table: FieldTable, *, unknown: UnknownFields
) -> tuple[dict[str, msgspec.Raw], tuple[str, ...]]:
    """The body's fields, and the names of those without effect."""
    fields = decode_keys(body)
    return fields, table.sort(fields, unknown=unknown)


def _in_share(prepared: Prepared, share: Share) -> Prepared:
    """With requests that say whose they are."""
    if not share.tenant:
        return prepared
    sequences = tuple(
        replace(sequence, engine_request=_request_in_share(sequence.engine_request, share))
        for sequence in prepared.generation.sequences
    )
    return replace(prepared, generation=replace(prepared.generation, sequences=sequences))


def _request_in_share(request: EngineRequest, share: Share) -> EngineRequest:
    priority = request.priority if share.best_priority is None else max(request.priority, share.best_priority)
    return msgspec.structs.replace(request, tenant=share.tenant, weight=share.weight, priority=priority)


def _claims_more(prepared: Prepared, share: Share) -> bool:
    """Whether the request's priority is better than its key allows: it gets the best that is allowed."""
    requests = [sequence.engine_request for sequence in prepared.generation.sequences]
    return share.best_priority is not None and any(one.priority < share.best_priority for one in requests)
