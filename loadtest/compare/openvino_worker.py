"""OpenVINO GenAI's continuous batching in a process of its own, without HTTP: closed loops by request of its parent.

Runs in that peer's environment, so it imports nothing of Headwater. One line of JSON in: prompts, concurrency and
output_len; one line out: the moments of each request on the monotonic clock, in nanoseconds. The first line out says
that it is ready: one token has been generated.
"""

import itertools
import json
import sys
import time
from typing import Any

import openvino_genai  # type: ignore[import-not-found]  # of the environment that it runs in


def main() -> None:
    """`python openvino_worker.py MODEL NUM_THREADS`."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 1, 64
    scheduler.max_num_batched_tokens = 512
    scheduler.dynamic_split_fuse = scheduler.enable_prefix_caching = True
    options = {"INFERENCE_NUM_THREADS": int(sys.argv[2])}
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", options)
    ids = itertools.count()
    _closed_loop(pipeline, ids, prompts=["a"], concurrency=1, output_len=1)
    _say("ready")
    for line in sys.stdin:
        _say(_closed_loop(pipeline, ids, **json.loads(line)))


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _closed_loop(
    pipeline: Any, ids: "itertools.count[int]", *, prompts: list[str], concurrency: int, output_len: int
) -> list[dict[str, Any]]:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = output_len, True, False
    config.apply_chat_template = False
    waiting = list(enumerate(prompts))[::-1]
    live: dict[int, Any] = {}
    done: list[dict[str, Any]] = [{"sent_ns": 0, "output_ns": [], "output_tokens": 0} for _ in prompts]
    while waiting or live:
        while waiting and len(live) < concurrency:
            index, prompt = waiting.pop()
            done[index]["sent_ns"] = time.monotonic_ns()
            live[index] = pipeline.add_request(next(ids), prompt, config)
        pipeline.step()
        for index, handle in list(live.items()):
            if handle.can_read():
                num_new = sum(len(output.generated_ids) for output in handle.read().values())
                done[index]["output_ns"].append(time.monotonic_ns())
                done[index]["output_tokens"] += num_new
            elif handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                del live[index]
    return done


if __name__ == "__main__":
    main()
