"""Two runs on the same artifact at the same time make each shard once, both end well, and the
one that waits shows for which.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from deepspec.artifacts.leases import Acquired, Leases, this_process
from deepspec.artifacts.run import Run, open_run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import TransientError
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import Progress
from deepspec.prompts.stage import run_prompts
from flows import lease_wait
from flows.child_runs import GROUP
from flows.lease_wait import leases_on
from flows.reporting import StageOutcome, watched_by
from flows.tasks import run_stages

GATED = ("answers.engine=tests.flows.engines:Gated",)


@flow
def answers(source: str, overrides: tuple[str, ...], shards: str = "") -> list[StageOutcome]:
    return run_stages(RunRequest(source, overrides), ("prompts", "answers"), shards)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()), daemon=True)
    thread.start()
    return thread, outcome


def wait_until(true: Callable[[], Any], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.1)


def lines(run_file: Path, name: str) -> list[int]:
    path = run_file.parent / name
    return sorted(int(line) for line in path.read_text().split()) if path.exists() else []


@pytest.mark.slow
def test_a_second_run_waits_for_the_first_one_and_repeats_nothing(
    run_file: Path, caplog: pytest.LogCaptureFixture
):
    (run_file.parent / "slow").touch()
    seen: list[Progress] = []

    def second() -> list[StageOutcome]:
        with watched_by(seen.append):
            return answers(str(run_file), GATED)

    first_thread, first = in_thread(lambda: answers(str(run_file), GATED))
    wait_until(lambda: lines(run_file, "waits") == [1])
    second_thread, waited = in_thread(second)
    wait_until(lambda: any("waiting for run" in progress.note for progress in seen))
    (run_file.parent / "slow").unlink()
    for thread in (first_thread, second_thread):
        thread.join(120)
    assert [outcome.state for outcome in (*first[0], *waited[0])] == [
        "done",
        "done",
        "already done",
        "already done",
    ]
    assert lines(run_file, "calls") == [0, 1, 2, 3, 4, 5], "each once"
    assert "answers: waiting for run '" in caplog.text
    url = waited[0][1].status.artifact_url
    assert (
        max(
            progress.done
            for progress in seen
            if progress.stage == "answers" and progress.state == "running"
        )
        > 1
    ), "it sees them come"
    assert Run(load_run(str(run_file))).artifact("answers").store.entries("claims") == []
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["flaky-answers"]))
        )
    messages = [
        str(artifact.description)
        for artifact in shown
        if str(artifact.description).startswith(f"answers: {url}")
    ]
    assert sum("waited: " in one for one in messages) == 1 and not any(
        "waiting for" in one for one in messages
    ), "not for ever"


@pytest.mark.slow
def test_runs_of_different_shards_work_in_parallel_and_what_a_dead_one_had_is_taken_over(
    run_file: Path,
):
    (run_file.parent / "slow").touch()
    config = load_run(str(run_file), GATED)
    first_thread, first = in_thread(lambda: answers(str(run_file), GATED, "0-2"))
    wait_until(lambda: lines(run_file, "waits") == [1])
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            "from deepspec.artifacts.leases import this_process; print(this_process())",
        ],
        capture_output=True,
        check=True,
    )
    leases = leases_on(Run(config).artifact("answers"))
    leases.lease = leases.lease.model_copy(
        update={"process": dead.stdout.decode().strip(), "run_id": "another"}
    )
    assert leases.acquire([3, 4, 5]).shards == [3, 4, 5]
    second_thread, second = in_thread(lambda: answers(str(run_file), GATED))
    wait_until(lambda: lines(run_file, "waits") == [1, 4])
    (run_file.parent / "slow").unlink()
    for thread in (first_thread, second_thread):
        thread.join(120)
    assert lines(run_file, "calls") == [0, 1, 2, 3, 4, 5], "each once"
    assert first[0][1].state == "done" and second[0][1].status.sealed


def test_a_child_run_does_not_keep_a_worker_waiting(run_file: Path):
    @flow
    def parent() -> None:
        with tags(GROUP):
            answers(str(run_file), (), "4")

    answers(str(run_file), (), "0")
    config = load_run(str(run_file))
    with leases_on(Run(config).artifact("answers")) as other:
        other.lease = other.lease.model_copy(update={"run": "capture x", "run_id": "another"})
        other.acquire([4])
        with pytest.raises(
            TransientError, match=r"another run works on these shards: run 'capture x' on "
        ):
            parent()
    assert this_process().startswith(other.lease.process.split()[0])


def test_what_an_earlier_try_of_a_run_left_at_work_is_not_made_again_by_the_next_one(
    run_file: Path,
):
    """Killed, a run leaves its child runs behind on other machines, and the UI's retry has the same
    id.
    """
    artifact, seen = Run(load_run(str(run_file))).artifact("answers"), list[list[int]]()

    @flow(retries=1)
    def tried_twice() -> None:
        leases = leases_on(artifact)
        seen.append(
            leases.acquire([1, 2]).shards
        )  # never released: as if killed, on another machine
        leases.lease = leases.lease.model_copy(update={"process": "elsewhere 1 2 3 4"})
        leases._write()
        if len(seen) == 1:
            raise RuntimeError("killed")

    tried_twice()
    assert seen == [[1, 2], []]


def test_runs_that_one_flow_starts_beside_each_other_are_no_family(run_file: Path):
    """A sweep's runs share what comes before their drafts; only a child skips the wait for its
    parent.
    """
    artifact = Run(load_run(str(run_file))).artifact("answers")

    @flow
    def part() -> str:
        return leases_on(artifact).lease.parent_run_id

    @flow
    def sweep() -> tuple[str, str, str]:
        with tags(GROUP):
            child = part()
        return leases_on(artifact).lease.run_id, child, part()

    own, child, other = sweep()
    assert (own, other) == (child, "")


def test_a_run_that_waits_for_hours_goes_on_waiting_while_the_store_is_away(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
):
    run = open_run(str(run_file))
    run_prompts(run)
    artifact, todo = run.artifact("answers"), stage_status(run, "answers")
    tries = list[int]()
    monkeypatch.setattr(lease_wait, "StoreWatch", partial(lease_wait.StoreWatch, poll_s=0.1))

    class Away(Leases):
        def acquire(self, wanted: Iterable[int]) -> Acquired:
            tries.append(1)
            if len(tries) == 2:
                raise TransientError("the server did not answer")
            if len(tries) == 3:
                other.release()
            return super().acquire(wanted)

    with (
        leases_on(artifact) as other,
        Away(artifact, other.lease.model_copy(update={"run_id": "another"})) as waiting,
    ):
        other.acquire(todo.missing)
        turn = flow(lease_wait.acquire_shards, validate_parameters=False)(waiting, run, todo)
        assert turn == (todo.missing, True)
