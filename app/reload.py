"""A reload: what the settings mean now takes the place of what is served, and no request is lost over it.

Three ways, and the one that is taken is told before it begins:
- *hand over*: the model's files and settings are the same. Its engine is replaced, and live requests go on in the next.
- *beside*: another model loads while the present one serves. Then new requests go to it; the old one finishes its own.
- *after*: memory does not hold both. New requests wait until the old one has finished its own, then the other loads.

Invariants: what is found wrong before the other model serves leaves the present one as it is; a stream ends on a model
of the fingerprint that it began on, by the tokenizer and template that it began with. One event loop's thread.
"""

import asyncio
import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import msgspec

from app.api.deps import ServerContext
from app.api.front import Front
from app.client.local import LocalEngineClient
from app.core.config import EngineConfig
from app.core.errors import ConfigurationError, EngineUnavailable
from app.core.types import EngineLimits
from app.runner.memory import available_memory
from app.serving import Ground, Serving
from app.settings import GIB
from app.text.model_files import read_special_tokens
from app.weights import Model, find_model, read_model

logger = logging.getLogger("headwater.reload")

Report = Callable[[str], None]


class Way(Enum):
    """How the next model takes over."""

    HAND_OVER = "hand over"
    BESIDE = "beside"
    AFTER = "after"


class Reloader:
    """What a server serves, and the change to something else."""

    def __init__(self, ground: Ground, fronts: list[Front], serving: Serving) -> None:
        self._ground = ground
        self._fronts = fronts
        self.serving = serving
        self._leaving: Serving | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()
        self._reloading: asyncio.Task[Any] | None = None
        self._install(serving)

    async def reload(self, tell: Report) -> bool:
        """Whether what the settings mean now is served. What is to be known is told and logged, a line each."""

        def report(line: str) -> None:
            logger.info("reload: %s", line)
            tell(line)

        if self._reloading is not None:
            report("not reloaded: another reload is under way")
            return False
        self._reloading = asyncio.current_task()
        try:
            await self._reload(report)
            return True
        except (ConfigurationError, EngineUnavailable) as error:
            report(f"not reloaded: {' '.join(str(error).split())}")
            return False
        except Exception as error:  # a defect, of which whoever asked must hear as well
            logger.exception("the reload failed")
            report(f"not reloaded: {type(error).__name__}: {' '.join(str(error).split())}")
            return False
        finally:
            self._reloading = None

    async def wait_failed(self) -> None:
        """Wait until no engine will be started any more for the model that is served."""
        await self._failed.wait()

    async def leave(self) -> None:
        """Say `draining` from now on; a reload under way is given up."""
        if self._reloading is not None:
            self._reloading.cancel()
            await asyncio.wait({self._reloading})
        self.serving.client.leave()

    async def drain(self, timeout: float) -> None:
        """Refuse new sequences and wait until the live ones have finished, of both models where there are two."""
        both = [self.serving] if self._leaving is None else [self.serving, self._leaving]
        await asyncio.gather(*(one.client.drain(timeout) for one in both))

    async def stop(self) -> None:
        """End the engines and every sequence still live."""
        for task in (self._watching, self._finishing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._leaving is not None:
            await self._leaving.client.stop()
        await self.serving.client.stop()

    async def _reload(self, report: Report) -> None:
        old, settings = self.serving, self._ground.settings
        limits = old.client.limits
        if limits is None:
            raise EngineUnavailable("the first engine is still loading: try again when /ready says ok")
        if self._leaving is not None:
            num_live = self._leaving.client.status.num_live_requests
            raise EngineUnavailable(f"the model before still finishes what it has ({num_live}): try again later")
        held = limits.weight_bytes if limits.device == "cpu" else 0
        loop = asyncio.get_running_loop()

        def report_from_thread(line: str) -> None:
            loop.call_soon_threadsafe(report, line)

        folder = await asyncio.to_thread(find_model, settings, report=report_from_thread, held_bytes=held)
        model = await asyncio.to_thread(read_model, settings, folder)
        way, why = choose_way(old.model, model, limits, overlap=settings.reload_overlap, available=available_memory())
        num_live = old.client.status.num_live_requests
        if way is Way.HAND_OVER:
            report(f"{why}: its engine is replaced and what runs ({num_live}) is handed over to the next one")
            await self._hand_over(model, report)
        elif way is Way.BESIDE:
            report(f"{why}: it loads beside the present one, which finishes what runs ({num_live})")
            await self._load_beside(model, _with_pool_of(limits, model.config), report)
        else:
            seconds = settings.drain_timeout
            report(
                f"{why}: new requests wait until what runs ({num_live}) has finished, {seconds:g} s at most, and while "
                "it loads"
            )
            await self._load_after(model, report)

    async def _hand_over(self, model: Model, report: Report) -> None:
        client, before = self.serving.client, self.serving.context
        # Loading it holds the interpreter up. Its own file is the same.
        is_same = read_special_tokens(model.folder.path) == before.tokenizer.special_tokens
        tokenizer = before.tokenizer if is_same else None
        context = await asyncio.to_thread(self._ground.make_context, model, client, before=before, tokenizer=tokenizer)
        self._install(await self._make_serving(model, client, context))
        if not await client.renew():
            raise EngineUnavailable(f"no engine can be kept alive: {client.status.detail}")
        report(f"reloaded: engine {client.status.generation} of the same model serves")
        _forget_old()

    async def _load_beside(self, model: Model, config: EngineConfig, report: Report) -> None:
        old, client = self.serving, self._ground.make_client(config)
        try:
            serving = await self._load(model, client, await self._make_context(model, client))
        except BaseException:
            await client.stop()
            raise
        self._leaving = old
        old.client.leave()
        self._ground.metrics.watch_leaving(old.context.engine_snapshot)
        self._install(serving)
        self._finishing = asyncio.create_task(self._let_finish(old), name="finish-before-reload")
        report(_describe(serving))

    async def _load_after(self, model: Model, report: Report) -> None:
        front, old, client = self._fronts[0], self.serving, self._ground.make_client(model.config)
        try:
            context = await self._make_context(model, client)  # what is wrong with it is found while the old one serves
            await self._empty(old)
            await old.client.stop()
            try:
                serving = await self._load(model, client, context)
            except Exception as error:
                await client.stop()
                await self._restore(old)
                raise EngineUnavailable(f"{error}; the model before was loaded again") from error
            self._install(serving)
        except BaseException:
            await client.stop()
            raise
        finally:
            front.release()
        report(_describe(serving))
        _forget_old()

    async def _empty(self, old: Serving) -> None:
        """Hold new requests back until the live ones have finished. Raises EngineUnavailable where that takes long."""
        front, seconds = self._fronts[0], self._ground.settings.drain_timeout
        front.hold()
        old.client.leave()
        try:
            await asyncio.wait_for(front.wait_empty(old.apps[0]), seconds)
        except TimeoutError:
            old.client.stay()
            num_live = old.client.status.num_live_requests
            raise EngineUnavailable(
                f"something still runs ({num_live}) after {seconds:g} s, and two engines may not run at once: try "
                "again later, or start with more --drain-timeout"
            ) from None

    async def _restore(self, old: Serving) -> None:
        """Serve again what was served: its engine is gone."""
        client = self._ground.make_client(old.model.config)
        context = replace(old.context, engine=client)
        await client.start()
        self._install(await self._make_serving(old.model, client, context))
        with suppress(ConfigurationError, EngineUnavailable):  # whoever waits for a failure hears of it
            await client.wait_ready(self._ground.settings.load_timeout)

    async def _load(self, model: Model, client: LocalEngineClient, context: ServerContext) -> Serving:
        await client.start()
        await client.wait_ready(self._ground.settings.load_timeout)
        return await self._make_serving(model, client, context)

    async def _make_context(self, model: Model, client: LocalEngineClient) -> ServerContext:
        return await asyncio.to_thread(self._ground.make_context, model, client, before=self.serving.context)

    async def _make_serving(self, model: Model, client: LocalEngineClient, context: ServerContext) -> Serving:
        return Serving(model, client, context, await asyncio.to_thread(self._ground.make_apps, context))

    def _install(self, serving: Serving) -> None:
        self.serving = serving
        for front, app in zip(self._fronts, serving.apps, strict=True):
            front.app = app
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._watch(serving.client), name="watch-for-failure")

    async def _watch(self, client: LocalEngineClient) -> None:
        await client.wait_failed()
        self._failed.set()

    async def _let_finish(self, old: Serving) -> None:
        await self._fronts[0].wait_empty(old.apps[0])
        await old.client.stop()
        self._leaving = None
        self._ground.metrics.watch_leaving(None)
        logger.info("the model before the reload has finished its requests; its engine is gone")
        _forget_old()


def choose_way(old: Model, new: Model, limits: EngineLimits, *, overlap: str, available: int) -> tuple[Way, str]:
    """How the new model takes over, and why, for people. `limits` are the present engine's, `available` in bytes."""
    if (new.folder.path, new.config, new.files) == (old.folder.path, old.config, old.files):
        return Way.HAND_OVER, f"{new.folder.name} is the same model"
    name = f"{new.folder.name} in {new.folder.path} is another model"
    if overlap == "always":
        return Way.BESIDE, name
    if overlap == "never":
        return Way.AFTER, f"{name}, and one engine runs at a time"
    if limits.device != "cpu":
        return Way.AFTER, f"{name}, and whether the device's memory holds two engines is not known"
    # Both pools, since neither is filled until it is used.
    weights = limits.weight_bytes * new.folder.num_parameters // max(1, old.folder.num_parameters)
    needed = weights + 2 * limits.kv_bytes
    facts = f"{needed / GIB:.1f} GiB are needed for both and {available / GIB:.1f} GiB are free"
    return (Way.BESIDE if needed <= available else Way.AFTER), f"{name} ({facts})"


def _with_pool_of(limits: EngineLimits, config: EngineConfig) -> EngineConfig:
    """With a KV pool as large as the present one, where nothing else was asked: not what is free beside it."""
    if not limits.kv_bytes or config.kv_cache_bytes is not None or config.num_kv_blocks is not None:
        return config
    return msgspec.structs.replace(config, kv_cache_bytes=limits.kv_bytes)


def _describe(serving: Serving) -> str:
    limits = serving.client.limits
    fingerprint = "" if limits is None else limits.fingerprint
    generation = serving.client.status.generation
    return f"reloaded: engine {generation} serves {serving.context.model_names[0]}, fingerprint {fingerprint}"


def _forget_old() -> None:
    """Collect what is left of the old application, and what the start had frozen of it."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
