"""Available memory and cores under control groups, and the size of the KV pool."""

from pathlib import Path

import pytest

from app.core.errors import ConfigurationError
from app.runner.memory import KVPlan, available_memory, num_cpus, plan_kv

MIB = 2**20


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2048000 kB\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_host_alone(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, {})) == 2_048_000 * 1024
    assert num_cpus(tmp_path) >= 1


def test_cgroup_v2_limit_of_an_ancestor_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/memory.max": str(100 * MIB),
            "sys/fs/cgroup/pod/memory.current": str(40 * MIB),
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {10 * MIB}\n",
            "sys/fs/cgroup/pod/box/memory.max": "max",
            "sys/fs/cgroup/pod/box/memory.current": str(30 * MIB),
            "sys/fs/cgroup/pod/cpu.max": "50000 100000",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
        },
    )
    assert available_memory(root) == 70 * MIB
    assert num_cpus(root) == 1


def test_cgroup_v1(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(64 * MIB),
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(60 * MIB),
            "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {6 * MIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert available_memory(root) == 10 * MIB


def test_a_group_over_its_limit_has_nothing(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(MIB),
            "sys/fs/cgroup/memory.current": str(2 * MIB),
        },
    )
    assert available_memory(root) == 0


def plan(**fields: object) -> KVPlan:
    defaults: dict[str, object] = {
        "available_bytes": 1000 * MIB,
        "bytes_per_token": 1024,
        "block_size": 64,
        "max_model_len": 2048,
        "max_num_seqs": 4,
    }
    return plan_kv(**(defaults | fields))  # type: ignore[arg-type]


def test_the_pool_is_what_the_sequences_need() -> None:
    assert plan() == KVPlan(num_blocks=128, block_size=64, num_bytes=8 * MIB, max_model_len=2048)
    assert plan(max_model_len=2049).num_blocks == 4 * 33


def test_without_a_request_it_takes_at_most_its_share() -> None:
    assert plan(max_num_seqs=100_000).num_bytes == 400 * MIB
    small = plan(available_bytes=2 * MIB)
    assert small.num_bytes <= 2 * MIB * 0.4
    assert small.max_model_len == small.num_blocks * 64 < 2048


def test_requests_are_honoured() -> None:
    assert plan(requested_bytes=5 * MIB).num_blocks == 80
    assert plan(requested_blocks=3).max_model_len == 192
    assert plan(requested_blocks=32, is_context_asked=True).max_model_len == 2048
    assert plan(requested_blocks=3, requested_bytes=5 * MIB).num_blocks == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"available_bytes": 100_000}, r"256 tokens needs 0\.2 MiB .* 0\.0 MiB are there; .*--max-model-len"),
        ({"requested_bytes": 65536}, r"256 tokens needs 0\.2 MiB .* 0\.1 MiB are there; .*--kv-cache-gib"),
        ({"requested_bytes": MIB, "is_context_asked": True}, r"2048 tokens needs 2\.0 MiB .* 1\.0 MiB are there"),
        ({"requested_bytes": 2000 * MIB}, r"takes 2,000\.0 MiB and 1,000\.0 MiB of memory are free"),
        ({"requested_blocks": 0}, "needs"),
        ({"requested_blocks": 4, "is_context_asked": True}, r"2048 tokens needs 2\.0 MiB .* --num-kv-blocks"),
    ],
)
def test_what_cannot_fit_is_refused_with_figures(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        plan(**fields)
