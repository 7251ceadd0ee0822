"""Cursors: what is written is read, whatever else is shown is refused; and digests do not depend on the division."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.cursor import DIGEST_BYTES, MAX_CURSOR_CHARS, ChoiceCursor, Cursor
from app.api.schemas.limits import INT32, INT64, MAX_RESUMABLE_CHOICES
from app.core.errors import InvalidRequest

DIGESTS = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
COUNTS = st.integers(0, INT32 - 1)
CHOICES = st.none() | st.builds(ChoiceCursor, COUNTS, DIGESTS, DIGESTS, COUNTS, st.booleans(), COUNTS)
CURSORS = st.builds(
    Cursor,
    fingerprint=DIGESTS,
    prompts=DIGESTS,
    parameters=DIGESTS,
    seed=st.integers(-INT64, INT64 - 1),
    created=st.integers(0, INT64 - 1),
    request_id=st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True),
    choices=st.lists(CHOICES, min_size=1, max_size=MAX_RESUMABLE_CHOICES).map(tuple),
    is_ended=st.booleans(),
)


@settings(max_examples=100)
@given(CURSORS)
def test_what_is_written_is_read_and_fits_into_a_header_and_an_address(cursor: Cursor) -> None:
    text = cursor.write()
    assert Cursor.read(text) == cursor
    assert re.fullmatch(r"[A-Za-z0-9_-]+", text) and len(text) <= MAX_CURSOR_CHARS


@settings(max_examples=150)
@given(CURSORS, st.data())
def test_a_damaged_cursor_is_refused(cursor: Cursor, data: st.DataObject) -> None:
    text = cursor.write()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    damaged = text[:start] + data.draw(st.text("AQgw_-0=é", max_size=4)) + text[end:]
    if damaged != text:
        with pytest.raises(InvalidRequest):
            Cursor.read(damaged)


@settings(max_examples=100)
@given(st.text(max_size=80) | st.text("1AZaz09_-", min_size=1, max_size=300).map("1{}".format))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Cursor.read(text)


def test_an_ordinary_cursor_is_short() -> None:
    choice = ChoiceCursor(120, bytes(8), bytes(8), 64)
    cursor = Cursor(
        fingerprint=bytes(8),
        prompts=bytes(8),
        parameters=bytes(8),
        seed=2**53 - 1,
        created=1_800_000_000,
        request_id="0" * 32,
        choices=(choice,),
    )
    assert len(cursor.write()) < 150
