"""What a run finds out about the pool that is to do its work: no such deployment, no room for
others, no worker.
"""

from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError
from flows import work_pool
from flows.stage_progress import StageProgress
from flows.work_pool import WorkPool


@pytest.fixture(scope="module")
def deployment() -> tuple[str, UUID]:
    """A pool without a worker, and the id of a deployment `answering/NAME` on it, both of this
    name.
    """
    name = f"empty-{uuid4().hex[:6]}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        return name, client.create_deployment(
            client.create_flow_from_name("answering"), name, work_pool_name=name
        )


@flow
def look_at(title: str, run_file: Path, *, looks: int = 0) -> tuple[int, str]:
    progress = StageProgress(
        "looking", stage_status(Run(load_run(str(run_file))), "answers"), sharded=True
    )
    found = WorkPool(title, progress)
    for _ in range(looks):
        found.warn_if_deserted(waiting=True)
    note = progress.current.note
    found.warn_if_deserted(waiting=False)
    assert progress.current.note == ""
    return found.room(), note


def test_a_deployment_that_is_not_there_is_named(run_file: Path):
    with pytest.raises(
        ConfigError,
        match=r"there is no deployment 'regenerate/nowhere' on the Prefect server\n"
        r".*where: resources\.runner\.workers",
    ):
        look_at("regenerate/nowhere", run_file)


def test_a_pool_without_a_worker_is_reported_once_with_the_command_that_starts_one(
    run_file: Path,
    deployment: tuple[str, UUID],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    name = deployment[0]
    assert look_at(f"answering/{name}", run_file, looks=3) == (1, ""), "not before a minute is over"
    monkeypatch.setattr(work_pool, "DESERTED_S", 0.0)
    warning = (
        f"no worker on the work pool '{name}': start one with `prefect worker start --pool {name}`"
    )
    assert look_at(f"answering/{name}", run_file, looks=3) == (1, warning)
    assert caplog.text.count(warning) == 1


def test_a_run_that_holds_the_only_place_of_the_pool_is_refused(
    run_file: Path,
    deployment: tuple[str, UUID],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    name, deployment_id = deployment
    with get_client(sync_client=True) as client:
        ours = client.create_flow_run_from_deployment(deployment_id)
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ROOT_FLOW_RUN_ID", str(ours.id))
        look_at(f"answering/{name}", run_file)
        assert "keeps one of its workers waiting" in caplog.text
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=1))
        with pytest.raises(ConfigError, match="itself holds the only place"):
            look_at(f"answering/{name}", run_file)
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=2))
        assert look_at(f"answering/{name}", run_file)[0] == 1
