"""The server that a command starts for itself: reachable as the command expects, whatever the variables say."""

import pytest

from app.terminal.child import child_environment, serve_command


def test_the_child_listens_on_this_machine_over_http_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "API_KEY_FILE", "METRICS_KEY_FILE", "SSL_CERTFILE", "SSL_KEYFILE", "ROOT_PATH"):
        monkeypatch.setenv(f"HEADWATER_{name}", "/nowhere")
    monkeypatch.setenv("HEADWATER_CACHE", "/models")
    environment = child_environment()
    assert {name for name in environment if name.startswith("HEADWATER_")} == {"HEADWATER_CACHE"}
    command = serve_command(1234, model="rill", arguments=("--page",))
    assert command[command.index("serve") :] == ["serve", "--host", "127.0.0.1", "--port", "1234", "--page", "rill"]
