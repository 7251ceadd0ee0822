"""The image and the compose file: what they promise about users, ports, signals and variables."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import ENV_PREFIX, OTHER_VARIABLES, Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FINAL_STAGE = DOCKERFILE[DOCKERFILE.index(" AS final") :]
SERVERS = ("cpu", "gpu")


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
    assert float(grace[:-1]) >= Settings.model_fields["drain_timeout"].default + 10


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


def test_prometheus_takes_its_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian's prometheus) is not installed")
    command = [promtool, "check", "config", str(ROOT / "deploy" / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
