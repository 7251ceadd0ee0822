"""The store of responses: bounded in count and bytes, each key's apart, conversations whole while anything leads on."""

import random

from app.api.responses_store import Message, ResponseStore, StoredResponse, Turn


def message(text: str) -> Message:
    return {"role": "user", "content": text}


def stored(text: str, previous: Turn | None = None, *, body: bytes = b"{}") -> StoredResponse:
    return StoredResponse(body, b'"sent"', Turn([message(text)], previous))


def texts(turn: Turn) -> list[object]:
    return [one["content"] for one in turn.conversation()]


def test_a_response_is_there_for_its_key_until_it_is_removed() -> None:
    store = ResponseStore(max_responses=10, max_bytes=10**6)
    store.add("a", "1", stored("x"))
    assert store.find("a", "1") is not None and store.find("b", "1") is None and store.find("a", "2") is None
    assert not store.remove("b", "1") and store.remove("a", "1") and not store.remove("a", "1")
    assert store.find("a", "1") is None and (store.num_responses, store.num_bytes) == (0, 0)


def test_a_conversation_outlives_the_responses_that_it_came_through() -> None:
    store = ResponseStore(max_responses=10, max_bytes=10**6)
    first = stored("one")
    second = stored("two", first.turn)
    store.add("", "1", first)
    store.add("", "2", second)
    store.remove("", "1")
    found = store.find("", "2")
    assert found is not None and texts(found.turn) == ["one", "two"]
    third = stored("three", second.turn)
    store.remove("", "2")
    assert store.num_bytes == 0
    store.add("", "3", third)
    assert texts(third.turn) == ["one", "two", "three"]
    assert store.num_bytes == third.num_bytes + sum(turn.num_bytes for turn in (first.turn, second.turn, third.turn))


def test_the_oldest_makes_room_and_what_was_used_is_young() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10**6)
    store.add("", "1", stored("x"))
    store.add("", "2", stored("x"))
    store.find("", "1")
    store.add("", "3", stored("x"))
    assert [name for name in "123" if store.find("", name)] == ["1", "3"]


def test_the_key_that_holds_most_makes_room() -> None:
    store = ResponseStore(max_responses=3, max_bytes=10**6)
    store.add("small", "1", stored("x"))
    store.add("large", "2", stored("x" * 5000))
    store.add("large", "3", stored("x"))
    store.add("large", "4", stored("x"))
    assert store.find("small", "1") is not None and store.find("large", "2") is None


def test_bytes_are_bounded_and_nothing_is_stored_that_exceeds_them() -> None:
    store = ResponseStore(max_responses=100, max_bytes=20_000)
    for number in range(50):
        store.add("", str(number), stored("x" * 3000))
        assert store.num_bytes <= 20_000
    assert 0 < store.num_responses < 10
    before = store.num_responses
    store.add("", "huge", stored("x" * 30_000))
    assert store.find("", "huge") is None and store.num_responses == before


def test_a_store_of_nothing() -> None:
    for store in (ResponseStore(max_responses=0), ResponseStore(max_bytes=0)):
        store.add("", "1", stored("x"))
        assert not store.is_on and store.find("", "1") is None


def test_counts_are_what_is_held_whatever_happens() -> None:
    """Random chains of three keys, added, used and removed: the bytes are those of the turns that can be reached."""
    drawn = random.Random(5)
    store = ResponseStore(max_responses=20, max_bytes=60_000)
    held: dict[tuple[str, str], StoredResponse] = {}
    for number in range(600):
        tenant = drawn.choice("abc")
        own = [name for key, name in held if key == tenant and store.find(key, name)]
        if own and drawn.random() < 0.2:
            store.remove(tenant, drawn.choice(own))
        else:
            previous = held[tenant, drawn.choice(own)].turn if own and drawn.random() < 0.7 else None
            response = stored("x" * drawn.randrange(2000), previous, body=b"x" * drawn.randrange(500))
            held[tenant, str(number)] = response
            store.add(tenant, str(number), response)
        alive = [one for (key, name), one in held.items() if store.find(key, name) is one]
        turns: set[Turn] = set()
        for one in alive:
            turn: Turn | None = one.turn
            while turn is not None:
                turns.add(turn)
                turn = turn.previous
        size = sum(one.num_bytes for one in alive) + sum(turn.num_bytes for turn in turns)
        assert (store.num_responses, store.num_bytes) == (len(alive), size)
        assert len(alive) <= 20 and size <= 60_000
