"""Flags over variables over defaults; every mistake is one sentence that names the setting."""

import re

import pytest

from app.cli import _settings, main, make_parser
from app.core.errors import ConfigurationError
from app.settings import Settings, load_settings, split_address


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("HEADWATER_")]:
        monkeypatch.delenv(name)


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_PORT", "9001")
    monkeypatch.setenv("HEADWATER_MAX_NUM_SEQS", "7")
    settings = load_settings(port="9002")
    assert (settings.port, settings.max_num_seqs, settings.host) == (9002, 7, "127.0.0.1")


@pytest.mark.parametrize("value", ["large  small", "large,small", "large, small"])
def test_names_in_a_variable_are_divided_by_commas_or_spaces(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_SERVED_MODEL_NAME", value)
    assert load_settings().served_model_name == ("large", "small")


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_MAX_NUM_SEQ", "7")
    with pytest.raises(ConfigurationError, match="HEADWATER_MAX_NUM_SEQ"):
        load_settings()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("port", "99999"),
        ("port", "http"),
        ("dtype", "fp8"),
        ("max_num_seqs", "0"),
        ("metrics_prefix", "9-"),
        ("tier", ""),
        ("num_threads", "100000"),
        ("kv_cache_gib", "inf"),
        ("drain_grace", "inf"),
        ("target_itl", "nan"),
        ("forwarded_allow_ips", "999.1.1.1"),
        ("forwarded_allow_ips", "proxy.example"),
        ("root_path", "llm"),
        ("root_path", "/llm/"),
        ("root_path", "/a b"),
        ("allowed_origins", "app.example"),
        ("allowed_origins", "https://app.example/"),
        ("otlp_traces_endpoint", "127.0.0.1:4318"),
        ("otlp_traces_endpoint", "grpc://127.0.0.1:4317"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(flag: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')}: .*{re.escape(value)}"):
        load_settings(**{flag: value})


def test_addresses_in_the_usual_forms_are_taken() -> None:
    origins = "http://localhost:3000,https://app.example,*,chrome-extension://abc,http://[::1]:80"
    assert load_settings(forwarded_allow_ips="10.0.0.0/8, ::1,*").forwarded_allow_ips == "10.0.0.0/8, ::1,*"
    settings = load_settings(root_path="/llm/v2", allowed_origins=origins, otlp_traces_endpoint="https://[::1]:4318/v1")
    assert settings.root_path == "/llm/v2" and settings.allowed_origins == tuple(origins.split(","))


def test_the_engine_is_told_what_concerns_it() -> None:
    config = load_settings(kv_cache_gib="1.5", max_model_len="512", target_itl="20").to_engine_config("/m", (2,))
    assert (config.kv_cache_bytes, config.max_model_len, config.target_itl_ms) == (3 * 2**29, 512, 20.0)
    assert (config.model_dir, config.eos_token_ids) == ("/m", (2,))


def test_every_setting_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["serve", "--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description is not None
        assert name == "model" or f"--{name.replace('_', '-')}" in text


def test_a_mistake_ends_the_command_with_status_2_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "http"]) == 2
    assert main(["check", "no-such-model"]) == 2
    errors = capsys.readouterr().err
    assert "--port" in errors and "no-such-model" in errors and "Traceback" not in errors


def test_list_names_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "smollm2-135m-instruct-q4 (Apache-2.0, the default" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "names", "model"),
    [
        (["--served-model-name", "gpt", "rill"], ("gpt",), "rill"),
        (["--served-model-name", "gpt,small", "rill"], ("gpt", "small"), "rill"),
        (["rill", "--served-model-name", "gpt", "--served-model-name=small"], ("gpt", "small"), "rill"),
        (["--served-model-name", "gpt small"], ("gpt", "small"), None),
    ],
)
def test_a_list_takes_one_value_a_flag_and_leaves_the_model_alone(
    arguments: list[str], names: tuple[str, ...], model: str | None
) -> None:
    options = make_parser().parse_args(["serve", *arguments])
    assert (_settings(options).served_model_name, getattr(options, "model", None)) == (names, model)


def test_a_name_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM takes several values after one flag: here the second is the model, and a third nothing."""
    with pytest.raises(SystemExit):
        make_parser().parse_args(["serve", "--served-model-name", "gpt", "small", "rill"])
    assert "unrecognized arguments: rill" in capsys.readouterr().err


def test_no_command_completes_flags() -> None:
    commands = next(iter(make_parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert {"serve", "check", "demo", "pretrain"} <= set(commands)  # type: ignore[arg-type]
    assert [parser for parser in (make_parser(), *commands.values()) if parser.allow_abbrev] == []  # type: ignore[union-attr]


def test_a_key_as_a_flag_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--api-key", "sk-0123456789abcdef"], ["--api-key=sk-0123456789abcdef"], ["--api-key"]):
        with pytest.raises(SystemExit) as exit_info:
            make_parser().parse_args(["check", "rill-stories-3m", *arguments])
        printed = "".join(capsys.readouterr())
        assert exit_info.value.code == 2
        assert "HEADWATER_API_KEY" in printed and "sk-0123" not in printed


def test_variables_of_kubernetes_service_links_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"HEADWATER_{name}", "10.0.0.1")
    assert load_settings().port == 8000
    monkeypatch.setenv("HEADWATER_PORT", "tcp://10.0.0.1:8000")
    assert load_settings(port="9000").port == 9000
    with pytest.raises(ConfigurationError, match=r"enableServiceLinks: false.*--port"):
        load_settings()


@pytest.mark.parametrize(
    ("value", "address"),
    [("127.0.0.1:9000", ("127.0.0.1", 9000)), ("[::1]:9000", ("::1", 9000)), ("localhost:0", ("localhost", 0))],
)
def test_an_address_has_a_host_and_a_port(value: str, address: tuple[str, int]) -> None:
    assert split_address(value) == address
    assert load_settings(metrics_listen=value).metrics_listen == value


@pytest.mark.parametrize("value", ["9000", ":9000", "localhost", "localhost:", "localhost:70000", "::1:9000", "a:b"])
def test_an_address_of_another_form_ends_the_start(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--metrics-listen: .*HOST:PORT"):
        load_settings(metrics_listen=value)
