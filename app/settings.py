"""The operator's settings: flags over HEADWATER_* variables over defaults, one table for all three.

Every field is a flag of `headwater serve` (`max_num_seqs` → `--max-num-seqs`) and a variable
(`HEADWATER_MAX_NUM_SEQS`). Values that do not parse, and variables that no field has, end the start
with a sentence. Automatic values are `None` here and resolved where they are known: in the engine.
"""

import os
import re
from ipaddress import ip_network
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError

ENV_PREFIX = "HEADWATER_"
API_KEY_VARIABLE = "HEADWATER_API_KEY"
OTHER_VARIABLES = frozenset({API_KEY_VARIABLE, "HEADWATER_CACHE", "HEADWATER_ISA"})
"""Variables that are no flags: a key (flags show in process lists), the store's cache folder, the native tier's ISA
level."""

_SERVICE_LINK = re.compile(rf"{ENV_PREFIX}(SERVICE_|PORT_\d+_)")
"""Variables that Kubernetes sets in every pod for a service called headwater."""

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
"""As browsers send it: a scheme, a host and perhaps a port, no path."""
_HTTP_URL = re.compile(r"https?://[^/\s?#]+(/[^\s#]*)?")

OFFLINE_MODEL = "rill-stories-3m"
"""The model that comes with Headwater."""

MIB = 1024 * 1024
GIB = 1024 * MIB


class Settings(BaseSettings):
    """Settings of `headwater serve`. The description of a field is its help text."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    model: str = Field("smollm2-135m-instruct-q4", description="catalogue name, folder, .gguf file or hub repository")
    offline: bool = Field(
        False, description=f"fetch nothing: serve what is on this machine, without MODEL {OFFLINE_MODEL}"
    )
    host: str = Field("127.0.0.1", description="address to listen on; the default is reachable from this machine only")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    root_path: str = Field("", description="path under which a reverse proxy publishes the server")

    forwarded_allow_ips: str = Field(
        "127.0.0.1",
        description="addresses or networks of proxies whose X-Forwarded headers are believed, comma between; * is all",
    )
    ssl_certfile: str | None = Field(None, description="certificate chain, PEM: serve https; with --ssl-keyfile")
    ssl_keyfile: str | None = Field(None, description="private key of --ssl-certfile, PEM, without a password")
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins whose pages may call the API from a browser (CORS), divided by commas; * is all"
    )
    api_key_file: str | None = Field(
        None,
        description="file with one API key a line, or name:key, with weight=2 or concurrency=8 after it; read again "
        f"when it changes. One key alone: the variable {API_KEY_VARIABLE}",
    )
    metrics_key_file: str | None = Field(None, description="file with keys that open /metrics and nothing else")
    metrics_listen: str | None = Field(
        None, description="HOST:PORT where /metrics is served, and nothing else, in place of the server's own address"
    )

    served_model_name: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names that requests may use, divided by commas, or the flag again; answers carry the first"
    )
    chat_template: str | None = Field(None, description="file with a chat template in place of the model's own")
    reasoning_parser: Literal["auto", "none", "qwen3", "deepseek_r1"] = Field(
        "auto",
        description="how reasoning is told from the answer: qwen3 by its tags, deepseek_r1 the same where the first is "
        "missing, none leaves it in the text; auto is qwen3 where the chat template has such tags",
    )
    generation_config: Literal["model", "openai"] = Field(
        "model", description="default temperature and top_p: of the model's generation_config.json, or OpenAI's (1.0)"
    )

    tier: Literal["auto", "native", "cuda", "any", "scripted"] = Field(
        "auto", description="what computes: native (C, CPU), cuda, any (transformers); auto takes the first that can"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to compute on")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field("auto", description="type of weights and KV")
    deterministic: bool = Field(
        False,
        description="serve only where no request's tokens depend on its batch: always so on tier native; the others "
        "compute in fixed shapes then, which costs time",
    )
    quantization: Literal["int8", "int8-safe", "int4"] | None = Field(
        None,
        description="quantise the weights while loading; int8-safe is nearer to bfloat16, int4 keeps a .gguf's bits",
    )
    max_model_len: int | None = Field(None, ge=1, description="context length; default: the model's, if memory allows")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="most sequences that share a step")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="token budget of a step; default: what takes about --target-itl"
    )
    target_itl: float | None = Field(
        None,
        gt=0,
        description="most time that prompts keep others' tokens waiting, ms; default 250 on CPU, 50 on GPU",
    )
    kv_cache_gib: float | None = Field(None, gt=0, description="memory for the KV cache, GiB; default: by free memory")
    num_kv_blocks: int | None = Field(None, ge=1, description="KV cache size in blocks, over --kv-cache-gib")
    block_size: int | None = Field(
        None, ge=1, description="tokens per KV block; default 64 on CPU, the native tier's only one, and 16 on GPU"
    )
    enable_prefix_caching: bool = Field(True, description="share the KV of equal prompt prefixes")
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="threads that compute; default: from the cores given to us"
    )

    docs: bool = Field(True, description="serve the API's description at /docs and /openapi.json")
    page: bool = Field(True, description="answer browsers at / with a page to try the model and watch the engine")
    unknown_fields: Literal["refuse", "report"] | None = Field(
        None,
        description="request fields that we do not know: 400 (default on completions), or named in the header "
        "Headwater-Ignored (default on chat)",
    )
    max_body_size: int = Field(2 * MIB, ge=1024, description="largest request body, bytes")
    max_live_sequences: int = Field(1024, ge=1, description="admitted sequences; beyond it 429 with Retry-After")
    max_live_per_key: int | None = Field(
        None, ge=1, description="admitted sequences of one API key; a key's own concurrency=N goes before it"
    )
    max_waiting_tokens: int | None = Field(
        None, ge=1, description="prompt tokens that may wait; beyond it 429; default 32 times the context"
    )
    max_stored_responses: int = Field(
        1000,
        ge=0,
        description="answers of /v1/responses kept in memory, at most 64 MiB of them, for previous_response_id and "
        "GET; 0 keeps none",
    )
    request_timeout: float | None = Field(
        None, gt=0, description="seconds that a request may take; then 504. A client may set less: X-Request-Deadline"
    )
    queue_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds that a request may wait for its first output; then 503. Where one would wait half as long "
        "by what was done lately, 429 at once",
    )
    metrics_prefix: str = Field("headwater_", description="prefix of metric names; vllm: fits existing dashboards")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that live requests get to finish on SIGTERM")
    resume_window: float = Field(
        60.0, ge=0, le=3600, description="seconds that a resumable stream is kept after its connection ended; 0 is off"
    )
    drain_grace: float | None = Field(
        None,
        ge=0,
        description="seconds after SIGTERM in which new requests are still served while /ready says draining; "
        "default 5, on loopback 0",
    )
    reload_overlap: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether a reload to another model runs two engines at once, so that no request waits; auto does "
        "where memory holds both",
    )
    load_timeout: float = Field(600.0, gt=0, description="seconds an engine may take to load before it is replaced")
    otlp_traces_endpoint: str | None = Field(
        None,
        description="URL that takes traces by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; extra: otel",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON lines")
    scripted: dict[str, float | int | str] = Field({}, description="JSON settings of the scripted tier, for tests")

    @field_validator("served_model_name", "allowed_origins", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return split_names(value) if isinstance(value, str) else value

    @field_validator("metrics_listen")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @field_validator("root_path")
    @classmethod
    def _is_path(cls, value: str) -> str:
        if value and not _ROOT_PATH.fullmatch(value):
            raise ValueError("takes a path such as /llm, with a / in front and none at the end")
        return value

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _are_proxies(cls, value: str) -> str:
        for proxy in value.split(","):
            if proxy.strip() != "*":
                ip_network(proxy.strip(), strict=False)
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"takes origins such as https://app.example:8443, or *, and not {origin!r}")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_http_url(cls, value: str | None) -> str | None:
        if value is not None and not _HTTP_URL.fullmatch(value):
            raise ValueError("takes a URL such as http://127.0.0.1:4318/v1/traces")
        return value

    @field_validator("metrics_prefix")
    @classmethod
    def _is_metric_prefix(cls, value: str) -> str:
        if not value or not value.replace("_", "a").replace(":", "a").isalnum() or value[0].isdigit():
            raise ValueError("takes letters, digits, '_' and ':' and does not begin with a digit")
        return value

    def to_engine_config(self, model_dir: str, eos_token_ids: tuple[int, ...]) -> EngineConfig:
        """The part that the engine process is told."""
        kv_cache_bytes = None if self.kv_cache_gib is None else int(self.kv_cache_gib * GIB)
        return EngineConfig(
            model_dir=model_dir,
            tier=self.tier,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            num_kv_blocks=self.num_kv_blocks,
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            target_itl_ms=self.target_itl,
            num_threads=self.num_threads,
            deterministic=self.deterministic,
            eos_token_ids=eos_token_ids,
            scripted=self.scripted,
        )


def split_address(value: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, an IPv6 host in brackets. Raises ValueError."""
    host, _, port = value.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port[:6]) > 65535 or (":" in bare and bare == host):
        raise ValueError("takes HOST:PORT, an IPv6 host as [::1]:9000")
    return bare, int(port)


def split_names(value: str) -> tuple[str, ...]:
    """The names of a list as it is typed: divided by commas or spaces."""
    return tuple(value.replace(",", " ").split())


def load_settings(**flags: object) -> Settings:
    """Settings from flags and the environment. Raises ConfigurationError with one line per mistake."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    links = {name for name in os.environ if _SERVICE_LINK.match(name)}
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known | links)
    if unknown:
        raise ConfigurationError(f"unknown variable {unknown[0]}: unset it; `headwater serve --help` lists them")
    if "port" not in flags and os.environ.get("HEADWATER_PORT", "").startswith("tcp://"):
        raise ConfigurationError(
            "HEADWATER_PORT is not a port but what Kubernetes sets for a service called headwater: "
            "set enableServiceLinks: false in the pod, or give --port"
        )
    try:
        settings = Settings(**flags)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        lines = [f"{_flag(detail['loc'])}: {detail['msg']}, got {detail['input']!r}" for detail in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None
    if settings.offline and "model" not in settings.model_fields_set:
        return settings.model_copy(update={"model": OFFLINE_MODEL})
    return settings


def _flag(location: tuple[int | str, ...]) -> str:
    return "--" + str(location[0]).removeprefix(ENV_PREFIX.lower()).replace("_", "-")
