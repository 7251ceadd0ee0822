"""Packed weights and the KV pool in memfds: the same bits, packed once, and never another model's."""

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from app.core.config import EngineConfig
from app.core.memory import EngineMemory
from app.core.plan import LogitsNeed, PlanEntry
from app.engine.build import build_engine
from app.runner.native import load
from app.runner.native.mapping import Mapping
from app.runner.native.pool import KVPool
from app.runner.native.runner import NativeRunner
from tests.native_models import GREEDY, SEEDED, Hand, load_native, makes_large_pages, prompt_ids, write_model

pytestmark = pytest.mark.skipif(not makes_large_pages(), reason="needs MADV_COLLAPSE of shared memory (Linux 6.1)")

HEADER_BYTES = 104


@pytest.fixture
def memory() -> Iterator[EngineMemory]:
    names = ("weights", "kv", "blocks")
    descriptors = [os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for name in names]
    yield EngineMemory.of(descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def load_kept(folder: Path, memory: EngineMemory, *, quantization: str | None = None) -> NativeRunner:
    config = EngineConfig(
        model_dir=str(folder),
        num_kv_blocks=64,
        max_num_batched_tokens=512,
        num_threads=1,
        quantization=quantization,
    )
    return load(config, memory)


def tokens_of(runner: NativeRunner, count: int = 12) -> list[int]:
    """A prompt of three blocks and what follows, greedy and drawn in one batch."""
    hand, prompt = Hand(runner), prompt_ids(150)
    params, blocks = (GREEDY, SEEDED), (range(4), range(4, 8))
    drawn = [
        hand.run(*(hand.entry(row, prompt, list(blocks[row]), params=params[row]) for row in range(2))),
    ]
    for index in range(count):
        entries = [
            hand.entry(row, drawn[-1][row].token_ids, list(blocks[row]), start=150 + index, params=params[row])
            for row in range(2)
        ]
        drawn.append(hand.run(*entries))
    return [token_id for rows in drawn for row in rows for token_id in row.token_ids]


@pytest.mark.parametrize("quantization", [None, "int8", "int8-safe", "int4"])
def test_a_later_engine_maps_what_the_first_one_packed(
    tmp_path: Path, memory: EngineMemory, quantization: str | None
) -> None:
    folder = write_model(tmp_path / "m", {"model_type": "qwen3", "tie_word_embeddings": False})
    own = load_native(folder, quantization=quantization)
    first = load_kept(folder, memory, quantization=quantization)
    later = load_kept(folder, memory, quantization=quantization)
    assert (first.info.kept.has_weights, first.info.kept.has_adopted_weights) == (True, False), first.info.kept.reason
    assert (later.info.kept.has_weights, later.info.kept.has_adopted_weights) == (True, True)
    assert own.info.fingerprint == first.info.fingerprint == later.info.fingerprint
    assert own.info.weight_bytes == first.info.weight_bytes == later.info.weight_bytes
    expected = tokens_of(own)
    assert tokens_of(first) == expected
    assert tokens_of(later) == expected


def test_nobody_can_write_to_kept_weights(tmp_path: Path, memory: EngineMemory) -> None:
    runner = load_kept(write_model(tmp_path / "m"), memory)
    assert memory.weights is not None
    with pytest.raises(PermissionError):
        os.pwrite(memory.weights, b"\x00", 8192)
    with pytest.raises(PermissionError):
        mmap.mmap(memory.weights, 4096, flags=mmap.MAP_SHARED)
    assert not runner.model.weights.layers[0].qkv.weight.flags.writeable


def test_another_quantization_or_a_changed_model_is_packed_anew(tmp_path: Path, memory: EngineMemory) -> None:
    folder = write_model(tmp_path / "m")
    load_kept(folder, memory)
    other = load_kept(folder, memory, quantization="int8")
    assert other.info.kept.has_weights is False, "the memfd is sealed, so it cannot hold these"
    assert tokens_of(other) == tokens_of(load_native(folder, quantization="int8"))
    write_model(folder, seed=1)
    changed = load_kept(folder, memory)
    assert changed.info.kept.has_weights is False
    assert tokens_of(changed) == tokens_of(load_native(folder))


@pytest.mark.parametrize("left", [1, HEADER_BYTES, 5000, 1 << 20, None])
def test_a_pack_that_was_cut_short_counts_for_nothing(tmp_path: Path, memory: EngineMemory, left: int | None) -> None:
    """Without the seal nothing counts, whole or not: the next engine packs again, in the same memfd."""
    folder = write_model(tmp_path / "m")
    done = load_kept(folder, memory)
    assert memory.weights is not None
    content = os.pread(memory.weights, os.fstat(memory.weights).st_size, 0)
    unfinished = os.memfd_create("unfinished", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(unfinished, content if left is None else content[:left], 0)
        again = load_kept(folder, EngineMemory(weights=unfinished))
        assert (again.info.kept.has_weights, again.info.kept.has_adopted_weights) == (True, False)
        assert tokens_of(again) == tokens_of(done)
    finally:
        os.close(unfinished)


@pytest.mark.parametrize("position", [0, 8, 12, 16, 48, 56, 72, -1])
def test_a_header_or_index_that_is_wrong_counts_for_nothing(
    tmp_path: Path, memory: EngineMemory, position: int
) -> None:
    """Sealed all the same: magic, version, flag, key, place of the index, its checksum, the index."""
    folder = write_model(tmp_path / "m")
    load_kept(folder, memory)
    assert memory.weights is not None
    content = bytearray(os.pread(memory.weights, os.fstat(memory.weights).st_size, 0))
    content[position] ^= 0x5A
    spoiled = os.memfd_create("spoiled", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(spoiled, content, 0)
        fcntl.fcntl(spoiled, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        runner = load_kept(folder, EngineMemory(weights=spoiled))
        assert runner.info.kept.has_adopted_weights is False
        assert tokens_of(runner) == tokens_of(load_native(folder))
    finally:
        os.close(spoiled)


def test_the_pool_holds_what_an_earlier_engine_computed(tmp_path: Path, memory: EngineMemory) -> None:
    """A prompt of two full blocks is read where the first engine left it: the next token is the same."""
    folder, prompt = write_model(tmp_path / "m"), prompt_ids(140)
    first = Hand(load_kept(folder, memory))
    (expected,) = first.run(first.entry(0, prompt, [0, 1, 2]))
    again = Hand(load_kept(folder, memory))
    (row,) = again.run(again.entry(0, prompt[128:], [0, 1, 5], start=128, prompt=prompt))
    assert row.token_ids == expected.token_ids


def test_measuring_the_token_budget_leaves_the_pool_alone(tmp_path: Path, memory: EngineMemory) -> None:
    folder = write_model(tmp_path / "m")
    load_kept(folder, memory).model.kv[:] = 0x1234
    config = EngineConfig(model_dir=str(folder), num_kv_blocks=64, num_threads=1)
    assert (load(config, memory).model.kv == 0x1234).all()


def test_pools_take_memory_as_blocks_are_reached() -> None:
    """Blocks of 64 KiB, 512 of which are made ready at once."""
    descriptor = os.memfd_create("pool", os.MFD_CLOEXEC)

    def held() -> int:
        return os.fstat(descriptor).st_blocks * 512

    try:
        reach = _reaching(pool := KVPool(4096, num_layers=2, num_elements=1 << 13, descriptor=descriptor))
        assert pool.is_kept, pool.reason
        first = held()
        assert first > 0
        reach(511)
        assert held() == first, "the first piece is made ready while loading"
        reach(512)
        second = held()
        assert second > first
        reach(10)
        _reaching(KVPool(4096, num_layers=2, num_elements=1 << 13, descriptor=descriptor))(512)
        assert held() == second, "another engine finds the pages that are there"
    finally:
        os.close(descriptor)


def test_without_large_pages_memory_is_the_engines_own(
    tmp_path: Path, memory: EngineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An advice that no kernel knows stands for a kernel that does not know this one."""
    monkeypatch.setattr("app.runner.native.mapping._MADV_COLLAPSE", 0x7777)
    folder = write_model(tmp_path / "m")
    runner = load_kept(folder, memory)
    assert (runner.info.kept.has_weights, runner.info.kept.has_kv) == (False, False)
    assert runner.info.kept.reason.endswith("this kernel makes no large pages of shared memory")
    assert tokens_of(runner) == tokens_of(load_native(folder))


def test_a_pool_without_its_record_is_not_kept(tmp_path: Path, memory: EngineMemory) -> None:
    """Its blocks are written anew, and nobody takes out what an earlier engine has entered of them."""
    folder = write_model(tmp_path / "m")
    config = EngineConfig(model_dir=str(folder), num_kv_blocks=64, max_num_batched_tokens=512, num_threads=1)
    assert build_engine(config, memory).limits.kept.has_kv
    broken = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        kept = build_engine(config, msgspec.structs.replace(memory, blocks=broken)).limits.kept
    finally:
        os.close(broken)
    assert kept.has_weights and not kept.has_kv


def test_a_mapping_goes_with_its_last_view() -> None:
    descriptor = os.memfd_create("mapped", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = Mapping(descriptor, 100, is_writable=True).bytes[10:20].view(np.uint16)
        view[:] = 7
        with pytest.raises(OSError):  # busy: it is mapped for writing
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        del view
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert Mapping(descriptor, 100, is_writable=False).bytes[10:20].view(np.uint16).tolist() == [7] * 5
    finally:
        os.close(descriptor)


def _reaching(pool: KVPool) -> Callable[[int], None]:
    def reach(block_id: int) -> None:
        entry = PlanEntry(
            row=0,
            start=0,
            token_ids=(1,),
            num_draft_tokens=0,
            block_table=(0, block_id),
            num_new_blocks=1,
            logits=LogitsNeed.LAST,
            sample=True,
        )
        pool.reach([entry])

    return reach
