"""The measurements of `tests/gpu/report.py`. Each takes its model as a folder and leaves nothing behind."""

import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import httpx
import torch
import transformers

from app.core.config import EngineConfig
from app.core.plan import LogitsNeed, PlanEntry, RowStart, StepPlan
from app.core.types import SamplingParams
from app.runner.torch.runner import TorchRunner
from app.store import resolve
from loadtest.faults.replicas import Replica, replicas
from tests.gpu.report_format import Machine, Restart, Step, Tests, Throughput
from tests.numerics.driver import Driver

ROOT = Path(__file__).resolve().parent.parent.parent
EIGHT_B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
TOKENIZER_MODEL = "rill-stories-3m"
PROMPT = tuple(range(100, 228))
KILL_AFTER = 16
"""Events of a stream."""


def machine(device: str) -> Machine:
    """Card and libraries; on a CPU, for a dry run, what is known there."""
    is_card = device == "cuda"
    properties: Any = torch.cuda.get_device_properties(0) if is_card else None
    return Machine(
        card=properties.name if is_card else "none, a dry run",
        driver=_driver_version() if is_card else None,
        capability=f"{properties.major}.{properties.minor}" if is_card else None,
        memory_gib=round(properties.total_memory / 2**30, 1) if is_card else None,
        read_gb_per_s=round(_read_speed(device, (4 << 30) if is_card else (16 << 20)) / 1e9, 1),
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        transformers=transformers.__version__,
        triton=_version("triton"),
    )


def run_tests() -> Tests:
    """tests/gpu and the Triton kernels, in a process of their own."""
    with NamedTemporaryFile(suffix=".xml") as file:
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=600", f"--junit-xml={file.name}"]
        command += ["tests/gpu", "tests/numerics/test_triton_kernels.py"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        suite = ElementTree.parse(file.name).getroot()[0]
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return Tests(passed=total - skipped - failed, failed=failed, skipped=skipped)


def cached(model: str) -> Path:
    """The folder of a catalogue's model."""
    return resolve(model, report=lambda line: None).path


def make_shape(folder: Path, fields: dict[str, Any]) -> Path:
    """A llama of random weights in bfloat16, with the tokenizer of a small model."""
    config = transformers.LlamaConfig(**fields, dtype="bfloat16", bos_token_id=None, eos_token_id=None)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cached(TOKENIZER_MODEL) / name, folder / name)
    return folder


@contextmanager
def loaded(folder: Path, device: str, *, max_num_seqs: int, deterministic: bool) -> Iterator[TorchRunner]:
    """A runner of the tier for this device."""
    from app.runner.torch import any_tier, cuda_tier

    config = EngineConfig(model_dir=str(folder), max_num_seqs=max_num_seqs, device=device, deterministic=deterministic)
    runner = (cuda_tier if device == "cuda" else any_tier).load(config)
    try:
        yield runner
    finally:
        runner.close()
        if device == "cuda":
            torch.cuda.empty_cache()


def decode_seconds(runner: TorchRunner, batch: int, *, context: int, num_steps: int) -> list[float]:
    """Of each decode step, forward and draw together, after some to warm up."""
    params = SamplingParams(seed=1, max_tokens=10_000, ignore_eos=True)
    warm_up = min(5, num_steps)
    width = -(-(context + warm_up + num_steps) // runner.info.block_size)
    tables = [tuple(range(row * width, (row + 1) * width)) for row in range(batch)]
    prompt = tuple(100 + index % 100 for index in range(context))
    for row, table in enumerate(tables):
        start = RowStart(str(row), params, prompt, ())
        entry = PlanEntry(row, 0, prompt, 0, table, width, LogitsNeed.NONE, False, start)
        runner.forward(StepPlan(0, (entry,)))
    seconds = []
    for step in range(warm_up + num_steps):
        entries = tuple(
            PlanEntry(row, context + step, (100 + step,), 0, table, 0, LogitsNeed.LAST, True)
            for row, table in enumerate(tables)
        )
        plan = StepPlan(step, entries)
        begin = time.perf_counter()
        runner.sample(plan, runner.forward(plan))
        seconds.append(time.perf_counter() - begin)
    return seconds[warm_up:]


def step(
    model: str, is_fixed: bool, batch: int, context: int, seconds: list[float], runner: TorchRunner, on: Machine
) -> Step:
    """The row of a report."""
    median = statistics.median(seconds)
    return Step(
        model=model,
        is_deterministic=is_fixed,
        batch=batch,
        context=context,
        step_ms=round(median * 1e3, 3),
        step_p90_ms=round(statistics.quantiles(seconds, n=10)[-1] * 1e3, 3),
        tokens_per_second=round(batch / median, 1),
        bandwidth_share=round(runner.info.weight_bytes / median / (on.read_gb_per_s * 1e9), 4),
    )


def prefill_seconds(runner: TorchRunner, num_tokens: int) -> float:
    """From a prompt to its first token, the better of two."""
    params = SamplingParams(seed=1, max_tokens=2)
    prompt = tuple(100 + index % 100 for index in range(num_tokens))
    width = -(-num_tokens // runner.info.block_size)
    entry = PlanEntry(
        0, 0, prompt, 0, tuple(range(width)), width, LogitsNeed.LAST, True, RowStart("0", params, prompt, ())
    )
    plan = StepPlan(0, (entry,))
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        runner.sample(plan, runner.forward(plan))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def throughput(folder: Path, streams: int, device: str, num_tokens: int) -> Throughput:
    """Prompts that differ, answers of one length, all at once: scheduler and runner in this process."""
    prompts = [[100 + index % 1000, *PROMPT] for index in range(streams)]
    params = SamplingParams(seed=1, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    with loaded(folder, device, max_num_seqs=streams, deterministic=False) as runner:
        driver = Driver(runner, budget=runner.info.max_num_batched_tokens, max_num_seqs=streams)
        driver.run(prompts[:1], params)
        begin = time.perf_counter()
        driver.run(prompts, params)
        ours = streams * num_tokens / (time.perf_counter() - begin)
    theirs = _transformers_throughput(folder, prompts, num_tokens) if device == "cuda" else None
    return Throughput(streams, round(ours, 1), None if theirs is None else round(theirs, 1))


def restart(folder: Path, model: str, *, device: str, num_tokens: int) -> Restart:
    """A server, a stream, a kill of its engine."""
    tier = "cuda" if device == "cuda" else "any"
    flags = ("--tier", tier, "--device", device, "--deterministic", "--max-num-seqs", "4", "--served-model-name", "m")
    with replicas(1, *flags, str(folder)) as (server,):
        expected, _ = _stream(server, num_tokens, is_killed=False)
        text, gap = _stream(server, num_tokens, is_killed=True)
    return Restart(model, round(gap, 3), text == expected)


def _stream(server: Replica, num_tokens: int, *, is_killed: bool) -> tuple[str, float]:
    """Its text, and the longest time without a token after the kill."""
    body = {"model": "m", "prompt": list(PROMPT), "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    text, gap, last, killed = "", 0.0, 0.0, False
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"seed": 1}, timeout=300.0) as response:
        response.raise_for_status()
        for count, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            gap = max(gap, time.perf_counter() - last if killed else 0.0)
            text += json.loads(line[6:])["choices"][0]["text"]
            last = time.perf_counter()
            if is_killed and count == KILL_AFTER:
                server.kill_engine()
                killed = True
    return text, gap


def _transformers_throughput(folder: Path, prompts: list[list[int]], num_tokens: int) -> float:
    """Tokens a second of `generate_batch` on the card, its second run."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    model = model.to("cuda").eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        outputs = model.generate_batch(prompts, generation_config=settings)
        seconds = time.perf_counter() - begin
    return sum(len(one.generated_tokens) for one in outputs.values()) / seconds


def _read_speed(device: str, num_bytes: int) -> float:
    """Bytes a second of a sum over a tensor, the best of five."""
    tensor = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        float(tensor.sum())
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds)


def _driver_version() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
