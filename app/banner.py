"""What the operator reads once the server is ready: one line for each thing that was decided."""

from collections.abc import Sequence

from app import __version__
from app.core.types import EngineLimits
from app.store import ModelFolder

GIB = 1024**3
MIB = 1024**2


def describe_model(folder: ModelFolder, limits: EngineLimits) -> list[tuple[str, str]]:
    """Label and value of each line about model, machine and memory."""
    independence = "yes: a request's tokens do not depend on its batch" if limits.row_independent else "no"
    return [
        ("model", f"{folder.name} ({folder.licence or 'licence not stated'}), {folder.num_parameters / 1e6:.0f} M"),
        ("source", folder.source),
        ("weights", _weights_line(folder, limits)),
        ("device", f"{limits.device}, {limits.dtype}"),
        ("tier", f"{limits.tier}: {limits.tier_reason}"),
        ("exact rows", independence),
        ("context", f"{limits.max_model_len} tokens"),
        ("KV cache", _kv_line(limits)),
        ("step", f"up to {limits.max_num_batched_tokens} tokens of up to {limits.max_num_seqs} sequences"),
        ("kept memory", _kept_line(limits)),
        ("loaded in", f"{limits.load_seconds:.1f} s"),
    ]


def banner(folder: ModelFolder, limits: EngineLimits, *, urls: Sequence[str], model_name: str, key: str | None) -> str:
    """The lines of a started server, with a command to paste at the end. The last URL has the metrics.

    `key` is what the command sends as the API key, as it stands between double quotes in a shell.
    """
    url = urls[0]
    request = (
        f'{{"model": "{model_name}", "prompt": "The sea is", "max_tokens": 32, "temperature": 0.2, "stream": true}}'
    )
    header = "" if key is None else f' -H "authorization: Bearer {key}"'
    curl = f"curl {url}/v1/completions{header} -H 'content-type: application/json' -d '{request}'"
    lines = [
        ("url", f"{url}/v1   (docs at {url}/docs, metrics at {urls[-1]}/metrics)"),
        ("page", f"{url}/"),
        *describe_model(folder, limits),
    ]
    return f"Headwater {__version__} is ready\n{table(lines)}\n\n{curl}\n"


def shown_in_shell(text: str) -> str:
    """A name for people within a command: what a shell would read is left out."""
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in text)


def table(lines: list[tuple[str, str]]) -> str:
    """Labels and values in two columns."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"  {label:{width}}  {value}" for label, value in lines)


def _kv_line(limits: EngineLimits) -> str:
    num_tokens = limits.num_kv_blocks * limits.block_size
    return (
        f"{_size(limits.kv_bytes)} = {num_tokens:,} tokens, "
        f"room for {limits.kv_room_in_sequences:.1f} sequences of full length"
    )


def _kept_line(limits: EngineLimits) -> str:
    """What a new engine finds when this one has died."""
    kept = limits.kept
    parts = [name for name, is_kept in (("weights", kept.has_weights), ("KV cache", kept.has_kv)) if is_kept]
    if not parts:
        return f"none: {kept.reason or f'tier {limits.tier} loads the model again when its engine dies'}"
    line = f"{' and '.join(parts)} outlive the engine"
    return f"{line}; {kept.reason}" if kept.reason else line


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def _weights_line(folder: ModelFolder, limits: EngineLimits) -> str:
    in_memory = f"{_size(limits.weight_bytes)} in memory"
    return in_memory if folder.source_bytes is None else f"{_size(folder.source_bytes)} at the source, {in_memory}"
