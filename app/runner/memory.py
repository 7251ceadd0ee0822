"""What this process may use of the machine, and how much of it the KV pool takes.

Memory and cores are the control group's and the affinity's where those are smaller than the host's.
Nothing here imports torch; every reader takes the file system's root, so tests bring their own.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError

KV_SHARE = 0.4
"""Most of the available memory that the KV pool takes when no size is asked for."""
MIN_CONTEXT = 256
"""A pool that holds fewer tokens than this (or than the context, if that is less) serves nobody."""

_ROOT = Path("/")


class KVPlan(msgspec.Struct, frozen=True):
    """The size of a KV pool."""

    num_blocks: int
    block_size: int
    """Tokens in a block."""
    num_bytes: int
    max_model_len: int
    """The context length, cut to what the pool holds where nobody asked for it by name."""


def plan_kv(
    *,
    available_bytes: int,
    bytes_per_token: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    requested_bytes: int | None = None,
    requested_blocks: int | None = None,
    is_context_asked: bool = False,
) -> KVPlan:
    """Size the pool: `requested_blocks`, else `requested_bytes`, else by need and memory.

    The need is `max_num_seqs` sequences of `max_model_len` tokens; without a request the pool takes
    that, but at most KV_SHARE of `available_bytes`. A pool smaller than one sequence shortens the
    context, unless the context was asked for (`is_context_asked`). Raises ConfigurationError with
    the bytes needed, the bytes there and the flag to change.
    """
    block_bytes = block_size * bytes_per_token
    blocks_a_sequence = math.ceil(max_model_len / block_size)
    if requested_blocks is not None:
        num_blocks, there = requested_blocks, requested_blocks * block_bytes
    elif requested_bytes is not None:
        num_blocks, there = requested_bytes // block_bytes, requested_bytes
    else:
        there = int(available_bytes * KV_SHARE)
        num_blocks = min(there // block_bytes, max_num_seqs * blocks_a_sequence)
    if num_blocks * block_bytes > available_bytes:
        raise ConfigurationError(
            f"the KV cache asked for takes {_size(num_blocks * block_bytes)} and {_size(available_bytes)} of memory "
            f"are free; lower --kv-cache-gib (or --num-kv-blocks)"
        )
    if requested_blocks is None or requested_blocks < 1 or is_context_asked:
        needed_len = max_model_len if is_context_asked else min(max_model_len, MIN_CONTEXT)
        _check_room(num_blocks, block_size, needed_len=needed_len, block_bytes=block_bytes, there=there)
    return KVPlan(
        num_blocks=num_blocks,
        block_size=block_size,
        num_bytes=num_blocks * block_bytes,
        max_model_len=min(max_model_len, num_blocks * block_size),
    )


def _check_room(num_blocks: int, block_size: int, *, needed_len: int, block_bytes: int, there: int) -> None:
    needed = math.ceil(needed_len / block_size)
    if num_blocks < needed:
        raise ConfigurationError(
            f"one sequence of {needed_len} tokens needs {_size(needed * block_bytes)} of KV cache and {_size(there)} "
            "are there; free memory, lower --max-model-len or raise --kv-cache-gib (or --num-kv-blocks)"
        )


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that may be allocated now: the host's MemAvailable or the control group's rest, if less."""
    available = _meminfo_available(root)
    for directory in _cgroup_directories(root, "memory"):
        limit = _number(directory / "memory.max") or _number(directory / "memory.limit_in_bytes")
        usage = _number(directory / "memory.current") or _number(directory / "memory.usage_in_bytes")
        if limit is not None and usage is not None:
            available = min(available, limit - usage + _reclaimable(directory))
    return max(0, available)


def num_cpus(root: Path = _ROOT) -> int:
    """Cores that this process may use: its affinity, or the control group's quota rounded up, if less."""
    cpus = len(os.sched_getaffinity(0))
    for directory in _cgroup_directories(root, "cpu"):
        quota = _cpu_quota(directory)
        if quota is not None:
            cpus = min(cpus, math.ceil(quota))
    return max(1, cpus)


def _meminfo_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigurationError("/proc/meminfo has no MemAvailable; give the KV cache's size with --kv-cache-gib")


def _cgroup_directories(root: Path, controller: str) -> Iterator[Path]:
    """The process's own control group and its ancestors, v2 and v1, as far as they are visible."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = mounts if not controllers else mounts / controller
        group = Path(path.lstrip("/"))
        yield from (mount / directory for directory in (group, *group.parents) if (mount / directory).is_dir())


def _cpu_quota(directory: Path) -> float | None:
    """Cores' worth of time, or None where there is no limit."""
    try:
        quota, period = (directory / "cpu.max").read_text().split()
    except (OSError, ValueError):
        v1_quota, v1_period = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
        return v1_quota / v1_period if v1_quota is not None and v1_quota > 0 and v1_period else None
    return None if quota == "max" else int(quota) / int(period)


def _reclaimable(directory: Path) -> int:
    """Bytes of page cache that the group drops before it runs out: counted as used, but free to take."""
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _number(path: Path) -> int | None:
    """The number in a file; None where it is missing, "max" or something else."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
