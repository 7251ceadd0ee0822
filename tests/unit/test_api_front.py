"""An address whose application changes: each request ends where it began, and held ones go to who is there then."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from app.api.front import ARRIVED, Front


class App:
    """Notes who came, and answers when it is let."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await self.may_answer.wait()


async def _receive() -> Message:
    raise AssertionError("nothing is read of a request that is held")


async def _send(_message: Message) -> None:
    return None


def ask(front: Front, method: str) -> asyncio.Task[None]:
    return asyncio.ensure_future(front({"type": "http", "method": method}, _receive, _send))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_request_ends_where_it_began() -> None:
    old, new = App(), App()
    front = Front(old)
    first = ask(front, "POST")
    await settle()
    front.app = new
    second = ask(front, "POST")
    empty = asyncio.ensure_future(front.wait_empty(old))
    await settle()
    assert (len(old.scopes), len(new.scopes)) == (1, 1) and not empty.done()
    new.may_answer.set()
    await second
    await settle()
    assert not empty.done()
    old.may_answer.set()
    await asyncio.gather(first, empty)
    await front.wait_empty(old)


async def test_held_posts_go_to_who_is_there_then_and_others_do_not_wait() -> None:
    old, new = App(), App()
    old.may_answer.set()
    new.may_answer.set()
    front = Front(old)
    front.hold()
    held = ask(front, "POST")
    await ask(front, "GET")
    await front.wait_empty(old)
    assert [scope["method"] for scope in old.scopes] == ["GET"]
    front.app = new
    front.release()
    await held
    (scope,) = new.scopes
    assert isinstance(scope[ARRIVED], float), "its time counts from when it came"


async def test_a_request_that_fails_is_over_too() -> None:
    async def fail(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError

    front = Front(fail)
    (error,) = await asyncio.gather(ask(front, "POST"), return_exceptions=True)
    assert isinstance(error, ValueError)
    await front.wait_empty(fail)
