"""The example for Kubernetes is valid, agrees with itself, and says what the commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from computron.cli import app

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes" / "parameter-service"
MANIFESTS: list[dict[str, Any]] = [
    document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
OLDEST = "1.28"


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def container(kind: str, name: str) -> dict[str, Any]:
    (only,) = manifest(kind, name)["spec"]["template"]["spec"]["containers"]
    return only


MASTER = container("Deployment", "computron-ps-master")
AGGREGATOR = container("StatefulSet", "computron-ps-aggregator")


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("document", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_manifests_follow_the_schema(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("words", [MASTER["args"], AGGREGATOR["args"]], ids=["master", "aggregator"])
def test_the_commands_take_the_options(words: list[str]) -> None:
    taken = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, [*words[:2], "--help"]).output
    for word in words[2:]:
        assert word.partition("=")[0] in taken


def test_the_master_and_the_autoscaler_agree_on_the_numbers() -> None:
    autoscaler = manifest("HorizontalPodAutoscaler", "computron-ps-aggregator")["spec"]
    assert f"--aggregators={autoscaler['minReplicas']}:{autoscaler['maxReplicas']}" in MASTER["args"]


def test_pods_are_given_the_time_that_draining_may_take() -> None:
    spec = manifest("StatefulSet", "computron-ps-aggregator")["spec"]["template"]["spec"]
    (patience,) = re.findall(r"--wait (\d+)", AGGREGATOR["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert spec["terminationGracePeriodSeconds"] > int(patience)


def test_aggregators_find_the_master() -> None:
    (url,) = [entry["value"] for entry in AGGREGATOR["env"] if entry["name"] == "COMPUTRON_PARAMETER_SERVICE"]
    service = manifest("Service", "computron-ps-master")
    assert url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
