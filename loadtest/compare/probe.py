"""What the machine can do at this moment: how fast it reads memory, and how fast it multiplies.

`python -m loadtest.compare.probe` prints both as JSON. It runs as a process of its own: the client that
measures loads neither numpy nor its threads. The figures are numpy's (BLAS dot products over a large
array, float32 matrix products, one thread a core): not the peaks of the instructions, but they move when
neighbours take memory or cores, and that is what they are for.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import msgspec

MOVED_LIMIT = 0.15
"""A run whose peaks differ by more than this part before and after it is repeated."""
_READ_BYTES = 128 << 20
_READ_ROUNDS = 12
_GEMM_SIZE = 512
_GEMM_ROUNDS = 12
_TIMEOUT_S = 60.0


class Peaks(msgspec.Struct, frozen=True):
    """All cores together, the best of several short rounds."""

    read_gbps: float
    """10^9 bytes per second."""
    gemm_gflops: float
    """10^9 float32 operations per second."""


def moved(before: Peaks, after: Peaks) -> float:
    """By which part the peaks changed, whichever changed more: 0.1 is 10 % of the higher figure."""
    pairs = ((before.read_gbps, after.read_gbps), (before.gemm_gflops, after.gemm_gflops))
    return max(1 - min(pair) / max(pair) for pair in pairs)


def probe() -> Peaks:
    """Measure in a child process, about a second. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "loadtest.compare.probe"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the probe of the machine's peaks failed: {result.stderr.decode(errors='replace')[-500:]}")
    return msgspec.json.decode(result.stdout, type=Peaks)


def measure(num_threads: int) -> Peaks:
    """Measure in this process. BLAS should be set to one thread."""
    import numpy as np

    data = np.ones(_READ_BYTES // 4, dtype=np.float32)
    parts = np.array_split(data, num_threads)
    matrices = [np.full((_GEMM_SIZE, _GEMM_SIZE), 0.5, dtype=np.float32) for _ in range(num_threads)]
    outputs = [np.empty_like(matrix) for matrix in matrices]
    read = _best(lambda i: np.dot(parts[i], parts[i]), num_threads, _READ_ROUNDS)
    gemm = _best(lambda i: np.matmul(matrices[i], matrices[i], out=outputs[i]), num_threads, _GEMM_ROUNDS)
    num_ops = 2.0 * _GEMM_SIZE**3 * num_threads
    return Peaks(read_gbps=data.nbytes / read / 1e9, gemm_gflops=num_ops / gemm / 1e9)


def _best(action: Callable[[int], object], num_threads: int, rounds: int) -> float:
    """Seconds of the fastest round of all threads at once; they live through the rounds."""
    import threading
    import time

    barrier = threading.Barrier(num_threads)

    def work(index: int) -> None:
        for _ in range(rounds):
            barrier.wait()
            action(index)
            barrier.wait()

    others = [threading.Thread(target=work, args=(index,)) for index in range(1, num_threads)]
    for thread in others:
        thread.start()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()  # before the barrier: another thread may run first
        barrier.wait()
        action(0)
        barrier.wait()
        seconds.append(time.perf_counter() - begin)
    for thread in others:
        thread.join()
    return min(seconds)


def main() -> None:
    """The child process."""
    # One BLAS thread for each of ours: the library's own pool would get in their way. Read when numpy is imported.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    peaks = measure(len(os.sched_getaffinity(0)))
    sys.stdout.write(msgspec.json.encode(peaks).decode() + "\n")


if __name__ == "__main__":
    main()
