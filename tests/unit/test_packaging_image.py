"""The image and the compose file: what they promise about users, ports, signals and variables."""

import json
import re
import shutil
import ssl
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.serve import PUBLIC_GRACE_SECONDS
from app.settings import ENV_PREFIX, OTHER_VARIABLES, Settings
from tests.certificates import make_certificate

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FINAL_STAGE = DOCKERFILE[DOCKERFILE.index(" AS final") :]
SERVERS = ("cpu", "gpu")
SCRAPE_KEY = "scrape-key"


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_every_service_is_confined_and_published_here_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"] and all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert set(service["profiles"]) <= set(SERVERS)


@pytest.mark.parametrize("name", SERVERS)
def test_stopping_leaves_time_to_drain(name: str) -> None:
    grace = COMPOSE["services"][name]["stop_grace_period"]
    assert grace.endswith("s")
    assert float(grace[:-1]) >= Settings.model_fields["drain_timeout"].default + PUBLIC_GRACE_SECONDS + 10


@pytest.mark.parametrize("name", SERVERS)
def test_models_lie_in_a_volume_of_the_user(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["volumes"] == ["models:/models"] and "models" in COMPOSE["volumes"]
    user, group = service["user"].split(":")
    assert f"USER {user}:{group}\n" in FINAL_STAGE
    assert f"install -d -o {user} -g {group} /models" in FINAL_STAGE


def test_dotenv_names_a_profile() -> None:
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert values["COMPOSE_PROFILES"] in SERVERS


def test_every_variable_is_a_setting() -> None:
    """An unknown HEADWATER_ variable ends the start: none may be set in the image or by compose."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    text = FINAL_STAGE + (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"HEADWATER_[A-Z_]+", text))
    assert used and used <= known


def test_final_stage_has_no_compiler_and_does_not_run_as_root() -> None:
    assert "apt-get" not in FINAL_STAGE and "gcc" not in FINAL_STAGE
    assert re.search(r"^USER [1-9]\d+:", FINAL_STAGE, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*\n\s+CMD \[", FINAL_STAGE, re.MULTILINE)


def test_prometheus_and_the_server_read_one_scrape_key() -> None:
    path = f"/run/secrets/{SCRAPE_KEY}"
    assert COMPOSE["secrets"] == {SCRAPE_KEY: {"file": "${SCRAPE_KEY_FILE:-/dev/null}"}}
    for name in ("prometheus", *SERVERS):
        assert COMPOSE["services"][name]["secrets"] == [SCRAPE_KEY]
    for name in SERVERS:
        assert COMPOSE["services"][name]["environment"]["HEADWATER_METRICS_KEY_FILE"] == path
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["authorization"] == {"credentials_file": path}


def test_prometheus_takes_its_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian's prometheus) is not installed")
    # Syntax alone: the file of the scrape key is there in the container only.
    command = [promtool, "check", "config", "--syntax-only", str(ROOT / "deploy" / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SERVERS)
def test_variables_of_dotenv_reach_the_server(name: str) -> None:
    """Compose reads .env for itself alone: without env_file a key in it would protect nothing."""
    assert ".env" in COMPOSE["services"][name]["env_file"]


def test_the_health_check_has_time_for_a_first_fetch() -> None:
    found = re.search(r"--start-period=(\d+)([sm])", FINAL_STAGE)
    assert found is not None
    assert int(found[1]) * {"s": 1, "m": 60}[found[2]] >= 600


@pytest.mark.parametrize("is_secure", [False, True])
def test_the_health_check_asks_as_the_server_serves(is_secure: bool, tmp_path: Path) -> None:
    found = re.search(r"^HEALTHCHECK .*\n\s+CMD (\[.*\])$", FINAL_STAGE, re.MULTILINE)
    assert found is not None
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        variables = {"HEADWATER_PORT": str(server.server_port)}
        if is_secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate, key = make_certificate(tmp_path)
            context.load_cert_chain(certificate, key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            variables["HEADWATER_SSL_CERTFILE"] = str(certificate)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        _, *arguments = json.loads(found[1])
        done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)
        server.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr


class Health(SimpleHTTPRequestHandler):
    """Answers /health alone."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
