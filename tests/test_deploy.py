"""What deploy/ holds is valid and agrees with itself. The Slurm script runs, over stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from computron import cli
from computron.config import Config, load_config
from computron.group.environment import Place
from computron.group.supervision import KILLING

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = [
    pytest.param(manifest, id=f"{path.stem}-{manifest['kind']}-{manifest['metadata']['name']}")
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
OLDEST = "1.28"  # which the StatefulSet says it needs
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def manifest(kind: str, name: str = "computron") -> dict[str, Any]:
    (found,) = [
        document
        for (document,) in (parameter.values for parameter in MANIFESTS)
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    ]
    return found


def quantity(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    return manifest("StatefulSet")["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


@pytest.fixture
def config(tmp_path) -> Config:
    path = tmp_path / "serve.toml"
    path.write_text(manifest("ConfigMap")["data"]["serve.toml"])
    return load_config(path)


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("document", MANIFESTS)
def test_manifests_follow_the_schema(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_is_strict():
    service = manifest("Service")
    broken = {**service, "spec": {**service["spec"], "publishNotReadyAdresses": True}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


@pytest.mark.parametrize("document", MANIFESTS)
def test_manifests_go_into_any_namespace(document):
    assert "namespace" not in document["metadata"]


def test_every_selector_finds_the_pods():
    labels = manifest("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    given_by_kubernetes = {"statefulset.kubernetes.io/pod-name": "computron-0"}
    for selector in (
        manifest("StatefulSet")["spec"]["selector"]["matchLabels"],
        manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        manifest("Service", "computron-nodes")["spec"]["selector"],
        manifest("Service")["spec"]["selector"],
    ):
        assert selector.items() <= (labels | given_by_kubernetes).items()


def test_as_many_pods_run_as_the_group_has_nodes(container, config):
    stateful_set = manifest("StatefulSet")
    assert stateful_set["spec"]["replicas"] == config.group.nodes
    assert stateful_set["spec"]["podManagementPolicy"] == "Parallel"


def test_each_pod_finds_its_place_in_the_group(container, config):
    variables = {entry["name"]: entry for entry in container["env"]}
    rank = variables["RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.labels['apps.kubernetes.io/pod-index']"
    values = {name: entry["value"] for name, entry in variables.items() if "value" in entry}
    place = Place.from_environment({**values, "RANK": "1"}, nodes=config.group.nodes)
    service = manifest("StatefulSet")["spec"]["serviceName"]
    assert manifest("Service", service)["spec"]["clusterIP"] == "None"
    assert manifest("Service", service)["spec"]["publishNotReadyAddresses"]
    assert place is not None
    assert place.master_host == f"computron-0.{service}"
    (port,) = manifest("Service", service)["spec"]["ports"]
    assert place.control_port == port["port"]


def test_a_pod_has_the_memory_that_its_configuration_takes(pod, container, config):
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert config.host.memory is not None
    assert quantity(resources["limits"]["memory"]) >= config.host.memory + quantity(shm["sizeLimit"]) + (4 << 30)


def test_a_pod_has_the_time_to_drain(pod, config):
    assert pod["terminationGracePeriodSeconds"] > config.server.drain_timeout + KILLING


def test_a_pod_is_reached_where_it_listens(container, config):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.server.host == "0.0.0.0"
    assert ports["http"] == config.server.port
    for probe, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/health/ready")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "http"}
    (client,) = manifest("Service")["spec"]["ports"]
    assert client["targetPort"] == "http"


def test_a_pod_reads_the_configuration_that_is_mounted(pod, container):
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "config"]
    command, path = container["args"]
    assert command == "serve"
    assert path == mount["mountPath"] + "/serve.toml"
    assert {"name": "config", "configMap": {"name": manifest("ConfigMap")["metadata"]["name"]}} in pod["volumes"]


def test_the_image_copies_only_what_the_build_context_has():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert all((DEPLOY.parent / name).exists() for name in kept)
    copied = re.findall(r"^COPY (?!--from)(\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) - {"."} <= set(kept)


SRUN = """#!/bin/bash
# Runs the command on each "host" at once, as srun does, and notes its own options.
while [[ $1 == --* ]]; do echo "$1" >>"$FAKE/options"; shift; done
for id in 0 1; do SLURM_NODEID=$id "$@" & echo $! >>"$FAKE/tasks"; done
touch "$FAKE/started"
code=0
for task in $(cat "$FAKE/tasks"); do wait "$task" || code=$?; done
exit $code
"""
SCANCEL = """#!/bin/bash
echo "$@" >>"$FAKE/scancel"
kill -TERM $(cat "$FAKE/tasks")
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames gpu-[1-2]" ]] && printf 'gpu-1\\ngpu-2\\n'
"""
COMPUTRON = """#!/bin/bash
trap 'kill "$sleeping"; exit ${STOP_CODE:-0}' TERM
sleep 1000 & sleeping=$!
echo "$@" >>"$FAKE/calls.$SLURM_NODEID"
wait
"""


class Job:
    """The batch script of a job on two hosts, which has started a `computron launch` on each."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("computron", COMPUTRON)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        slurm = {"SLURM_JOB_NODELIST": "gpu-[1-2]", "SLURM_JOB_ID": "123456", "SLURM_CPUS_PER_TASK": "32"}
        path = f"{folder}/bin:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [str(DEPLOY / "slurm" / "computron.sbatch"), "serve.toml"],
            env={**os.environ, **slurm, "PATH": path, "FAKE": str(folder), **environment},
            stderr=subprocess.DEVNULL,
        )
        self._wait_until(lambda: all((folder / name).exists() for name in ("calls.0", "calls.1", "started")))

    def _wait_until(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def lines(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()


@pytest.fixture
def job(tmp_path):
    jobs: list[Job] = []

    def start(**environment: str) -> Job:
        jobs.append(Job(tmp_path, **environment))
        return jobs[-1]

    yield start
    for one in jobs:
        if one.process.poll() is None:
            one.process.terminate()
        one.process.wait(30)


def test_slurm_runs_one_supervisor_on_each_host(job):
    running = job()
    for host in (0, 1):
        (call,) = running.lines(f"calls.{host}")
        assert call == f"launch serve.toml --hosts gpu-1,gpu-2 --host-rank {host} --rendezvous gpu-1:23456"
    assert {"--ntasks-per-node=1", "--cpus-per-task=32", "--kill-on-bad-exit=0"} <= set(running.lines("options"))


def test_the_call_that_slurm_makes_is_one_that_the_command_takes(job, tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text('[group]\ntensor_parallel = 4\n[[models]]\nid = "a"\nsource = "random:tiny"\n')
    shares = []
    monkeypatch.setattr("computron.group.launch.launch", lambda config, share, *rest, **more: shares.append(share) or 0)
    monkeypatch.chdir(tmp_path)
    (call,) = job().lines("calls.1")
    result = CliRunner().invoke(cli.app, call.split())
    assert result.exit_code == 0, result.output
    assert list(shares[0].ranks) == [2, 3]


@pytest.mark.parametrize("code", [0, 1])
def test_slurms_warning_stops_the_supervisors_in_order(job, code):
    running = job(STOP_CODE=str(code))
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == code
    assert running.lines("scancel") == ["--signal=TERM 123456"]


def test_the_slurm_script_says_how_it_is_used():
    script = DEPLOY / "slurm" / "computron.sbatch"
    result = subprocess.run([str(script)], capture_output=True, text=True, timeout=30)
    assert result.returncode != 0
    assert "usage: sbatch computron.sbatch CONFIG.toml" in result.stderr
