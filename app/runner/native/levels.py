"""Instruction set levels that the kernels are compiled for, and which one this CPU serves.

Each level's bits are its own; a level is named in the fingerprint. Never -march=native: a library runs
on every CPU of its level.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from app.runner.base import TierUnavailable

ISA_VARIABLE = "HEADWATER_ISA"
"""Forces a level by name, for tests."""


@dataclass(frozen=True)
class Level:
    """One compiled form of the kernels."""

    name: str
    header: str
    """The file in src/ that defines the vector operations."""
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]
    """Names in /proc/cpuinfo that the level needs."""


_X86_64_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_X86_64_V4 = _X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

LEVELS = (
    Level(
        name="avx512bf16",
        header="simd_avx512.h",
        compiler_flags=("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        cpu_flags=_X86_64_V4 | {"avx512_bf16", "avx512_vnni"},
    ),
    Level(name="avx2", header="simd_avx2.h", compiler_flags=("-march=x86-64-v3",), cpu_flags=_X86_64_V3),
)
"""Best first."""


def choose_level(
    *, cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None, forced: str | None = None
) -> Level:
    """The best level this CPU has, or the one that `forced` (else HEADWATER_ISA) names.

    Raises TierUnavailable where the CPU has none, or not the named one.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in ("x86_64", "AMD64"):
        raise TierUnavailable(f"there are no native kernels for {machine} yet", remedy=None)
    there = _cpu_flags(cpuinfo)
    wanted = os.environ.get(ISA_VARIABLE) if forced is None else forced
    if wanted:
        return _named_level(wanted, there)
    for level in LEVELS:
        if level.cpu_flags <= there:
            return level
    missing = ", ".join(sorted(LEVELS[-1].cpu_flags - there))
    raise TierUnavailable(f"this CPU lacks {missing}", remedy="use a CPU with AVX2 and FMA (2013 or newer)")


def _named_level(name: str, there: frozenset[str]) -> Level:
    for level in LEVELS:
        if level.name == name:
            if missing := level.cpu_flags - there:
                raise TierUnavailable(f"{ISA_VARIABLE}={name}, and this CPU lacks {', '.join(sorted(missing))}")
            return level
    names = ", ".join(level.name for level in LEVELS)
    raise TierUnavailable(f"{ISA_VARIABLE}={name} names no level", remedy=f"set one of {names}")


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
