"""The files for several machines, as far as they can be checked without Docker or a cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "deployments"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "compose.yaml").read_text()))


def environment(service: dict[str, Any]) -> dict[str, str]:
    return dict(service.get("environment", {}))


def test_servers_are_published_on_loopback_unless_told_otherwise():
    ports = [
        port for service in compose()["services"].values() for port in service.get("ports", ())
    ]
    assert ports and all(port.startswith("${BIND:-127.0.0.1}:") for port in ports)


def test_no_file_holds_a_secret_and_what_must_be_filled_in_is_asked_for():
    example = (FOLDER / ".env.example").read_text()
    secret = re.compile("PASSWORD|SECRET_ACCESS_KEY|ACCESS_KEY_ID|ROOT_USER")
    for service in compose()["services"].values():
        for name, value in environment(service).items():
            if secret.search(name):
                found = VARIABLE.fullmatch(value)
                assert found and found[2] == "?", f"{name} has a default, or stands there in words"
    for name, kind, _ in VARIABLE.findall((FOLDER / "compose.yaml").read_text()):
        assert re.search(rf"^{name}=$" if kind == "?" else rf"^#{name}=", example, re.MULTILINE), (
            f"{name} is not explained"
        )
    assert ".env" in (REPOSITORY / ".gitignore").read_text().split()
    assert "deployments/.env" in (FOLDER / "Dockerfile.dockerignore").read_text().split()


def test_every_service_waits_for_one_that_there_is():
    services = compose()["services"]
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]
    named = {
        volume.partition(":")[0]
        for service in services.values()
        for volume in service.get("volumes", ())
    }
    assert named == set(compose()["volumes"])


def test_what_the_image_copies_is_there_and_not_ignored():
    allowed = {
        line[1:]
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        name
        for line in (FOLDER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    }
    assert copied and copied <= allowed and all((REPOSITORY / name).exists() for name in copied)


def test_a_server_takes_the_kubernetes_pool_and_the_deployments_on_it(tmp_path: Path):
    template = json.loads((FOLDER / "kubernetes" / "work_pool.json").read_text())
    with get_client(sync_client=True) as client:
        client.create_work_pool(
            WorkPoolCreate(
                name="deepspec-kubernetes", type="kubernetes", base_job_template=template
            )
        )
        command = [
            sys.executable,
            "-m",
            "prefect",
            "--no-prompt",
            "deploy",
            "--all",
            "--prefect-file",
            "deployments/kubernetes/prefect.yaml",
        ]
        env = {
            **os.environ,
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_HOME": str(tmp_path),
        }
        done = subprocess.run(
            command,
            env=env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = client.read_deployments()
    on_pool = [
        deployment for deployment in found if deployment.work_pool_name == "deepspec-kubernetes"
    ]
    assert {deployment.entrypoint for deployment in on_pool} >= {
        "flows.pipeline.pipeline",
        "flows.pipeline.train_draft",
    }
    assert all(deployment.job_variables == {} for deployment in on_pool)


def test_the_helm_values_keep_the_server_inside_and_pinned():
    server = yaml.safe_load((FOLDER / "kubernetes" / "server-values.yaml").read_text())
    worker = yaml.safe_load((FOLDER / "kubernetes" / "worker-values.yaml").read_text())
    assert (
        server["service"]["type"] == "ClusterIP"
        and not server["ingress"]["enabled"]
        and not server["secret"]["create"]
    )
    version = server["global"]["prefect"]["image"]["prefectTag"]
    pinned = re.search(
        r"^prefect==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE
    )
    assert (
        pinned
        and version.startswith(f"{pinned[1]}-")
        and worker["worker"]["image"]["prefectTag"].startswith(version)
    )


def test_the_pods_that_train_together_run_the_documented_line_and_meet_at_the_first_of_them():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes" / "train_nodes.yaml").read_text())
    spec, name = job["spec"], job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert (
        spec["completionMode"] == "Indexed"
        and spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    )
    command = spec["template"]["spec"]["containers"][0]["command"]
    assert command[: command.index("-m")] == [
        *(
            "torchrun",
            "--nnodes",
            str(spec["completions"]),
            "--nproc-per-node",
            "8",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "draft-1",
        ),
        *("--rdzv-endpoint", f"{name}-0.{service['metadata']['name']}:29500"),
    ]
    assert spec["parallelism"] == spec["completions"]
    documented = (REPOSITORY / "docs" / "cluster.md").read_text()
    words = " ".join(command[1 : command.index("--rdzv-endpoint")])
    assert words in documented
