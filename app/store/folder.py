"""What a canonical model folder says about itself: read from its JSON files and safetensors headers.

Reads no weights and runs nothing. Every value that the server takes over is checked here.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError

Json = dict[str, object]

GGUF_WEIGHTS = "model.gguf"
BLOCKS_INDEX = "model.gguf.index.json"
"""Where each tensor of model.gguf lies: the folder's weights are served as the file has them."""

_DTYPES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling defaults of generation_config.json; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def or_else(self, other: "GenerationDefaults") -> "GenerationDefaults":
        """These, and those of `other` where these say nothing."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return GenerationDefaults(**{name: theirs[name] if value is None else value for name, value in mine.items()})


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that both processes can read, and the facts that `check` and `serve` print."""

    path: Path
    name: str
    source: str
    """Where it came from, in words fit to print."""
    revision: str | None
    licence: str | None
    max_model_len: int
    """The model's own context length."""
    eos_token_ids: tuple[int, ...]
    generation_defaults: GenerationDefaults
    num_bytes: int
    """Of the weights in the folder."""
    source_bytes: int | None
    """Of the file that the folder was converted from; None where nothing was converted."""
    num_parameters: int
    """Elements of all stored tensors."""
    dtype: str
    """In which most of the weights are stored."""


class WeightFacts(msgspec.Struct, frozen=True):
    """Summed over the safetensors files of a folder."""

    num_bytes: int
    num_parameters: int
    dtype: str


def describe_folder(
    path: Path,
    *,
    name: str,
    source: str,
    revision: str | None = None,
    licence: str | None = None,
    source_bytes: int | None = None,
) -> ModelFolder:
    """Read the facts of a folder.

    Raises:
        ConfigurationError: a file that is needed is missing or damaged, named with what to do.
    """
    config = read_json(path / "config.json")
    require_tokenizer(path)
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    weights = _block_facts(path) if is_in_blocks(path) else weight_facts(path)
    return ModelFolder(
        path=path,
        name=name,
        source=source,
        revision=revision,
        licence=licence,
        max_model_len=_context_length(path, config),
        eos_token_ids=_eos_token_ids(path, generation, config),
        generation_defaults=_generation_defaults(path, generation),
        num_bytes=weights.num_bytes,
        source_bytes=source_bytes,
        num_parameters=weights.num_parameters,
        dtype=weights.dtype,
    )


def read_json(path: Path) -> Json:
    """A JSON object from a file.

    Raises:
        ConfigurationError: missing, unreadable, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def require_tokenizer(path: Path) -> None:
    """Refuse a folder without tokenizer.json, saying how to make one."""
    if (path / "tokenizer.json").is_file():
        return
    raise ConfigurationError(
        f"{path} has no tokenizer.json, the only tokenizer format that is served. Where transformers is installed, "
        f'write one into the folder with: python -c "from transformers import AutoTokenizer as A; '
        f"A.from_pretrained('{path}').save_pretrained('{path}')\""
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else model.safetensors, else every one there.

    Raises:
        ConfigurationError: there is none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConfigurationError(f"{index} has no weight_map")
        shards = sorted({str(name) for name in names.values()})
        for shard in shards:
            if Path(shard).name != shard or not (path / shard).is_file():
                raise ConfigurationError(f"{index} names {shard!r}, which is not in the folder; download it again")
        return [path / shard for shard in shards]
    single = path / "model.safetensors"
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if files:
        return files
    if list(path.glob("*.bin")) or list(path.glob("*.pt")) or list(path.glob("*.pth")):
        raise ConfigurationError(
            f"{path} has pickled weights alone, which can run code when they are loaded and never are; "
            "convert them to safetensors"
        )
    raise ConfigurationError(f"{path} has no weights: no model.safetensors, no index with shards")


def is_in_blocks(path: Path) -> bool:
    """Whether the folder's weights are a .gguf file as it is."""
    return (path / BLOCKS_INDEX).is_file()


def _block_facts(path: Path) -> WeightFacts:
    tensors = read_json(path / BLOCKS_INDEX).get("tensors")
    try:
        entries = msgspec.convert(tensors, dict[str, _IndexEntry])
        num_bytes = sum((path / file).stat().st_size for file in {entry.file for entry in entries.values()})
    except (msgspec.ValidationError, OSError) as error:
        raise ConfigurationError(f"{path / BLOCKS_INDEX} does not fit its folder: {error}; get it again") from error
    counts = Counter[str]()
    for entry in entries.values():
        counts[entry.kind] += math.prod(entry.shape)
    return WeightFacts(num_bytes, counts.total(), counts.most_common(1)[0][0])


class _IndexEntry(msgspec.Struct, frozen=True):
    file: str
    kind: str
    shape: tuple[int, ...]


def weight_facts(path: Path) -> WeightFacts:
    """Count bytes and parameters from the headers of the safetensors files."""
    num_parameters, bytes_by_dtype = 0, Counter[str]()
    files = weight_files(path)
    for file in files:
        for dtype, num_elements, num_bytes in _header_entries(file):
            num_parameters += num_elements
            bytes_by_dtype[dtype] += num_bytes
    if not bytes_by_dtype:
        raise ConfigurationError(f"{path} has no tensors in {', '.join(file.name for file in files)}")
    dtype = bytes_by_dtype.most_common(1)[0][0]
    return WeightFacts(sum(file.stat().st_size for file in files), num_parameters, _DTYPES.get(dtype, dtype))


def _header_entries(file: Path) -> list[tuple[str, int, int]]:
    """(dtype, elements, bytes) of each tensor, after checking that the file is as long as they say."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ConfigurationError(f"{file} is not a complete safetensors file; get it again")
        header = stream.read(length)
    try:
        tensors = msgspec.json.decode(header, type=dict[str, Json])
        entries = [_header_entry(tensor) for name, tensor in tensors.items() if name != "__metadata__"]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{file} has a damaged safetensors header: {error}") from error
    if sum(num_bytes for _, _, num_bytes in entries) != size - 8 - length:
        raise ConfigurationError(f"{file} is not as long as its header says; get it again")
    return entries


def _header_entry(tensor: Json) -> tuple[str, int, int]:
    shape, offsets = tensor["shape"], tensor["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError("shape and data_offsets must be lists")
    start, end = offsets
    return str(tensor["dtype"]), math.prod(shape), end - start


def _context_length(path: Path, config: Json) -> int:
    for scope in _scopes(config):
        for field in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"):
            value = scope.get(field)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise ConfigurationError(f"{path / 'config.json'} gives no context length (max_position_embeddings)")


def _eos_token_ids(path: Path, generation: Json, config: Json) -> tuple[int, ...]:
    """Those of generation_config.json, else of config.json."""
    for scope in (generation, *_scopes(config)):
        value = scope.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise ConfigurationError(f"{path} gives eos_token_id = {value!r}, expected token ids")
        return tuple(dict.fromkeys(ids))
    return ()


def _generation_defaults(path: Path, generation: Json) -> GenerationDefaults:
    """The fields that are given, checked for their types."""
    names = GenerationDefaults.__struct_fields__
    fields = {name: generation[name] for name in names if generation.get(name) is not None}
    try:
        return msgspec.convert(fields, GenerationDefaults, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path / 'generation_config.json'} cannot be used: {error}") from error


def _scopes(config: Json) -> list[Json]:
    """The configuration itself and, for models of several parts, that of the text part."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]
