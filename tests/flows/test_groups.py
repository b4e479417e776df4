"""What a run asks of a pool's workers, without a worker: nothing is asked for twice, and
nobody's shards are given to another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest
from prefect import flow, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.states import Crashed, Failed, Running, State
from prefect.types._datetime import now

from deepspec.artifacts.leases import Lease, Leases
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import put_failure
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import DeepSpecError, ShardsFailed, TransientError
from deepspec.process.launch import RunRequest
from flows import pool_executor as workers
from flows.automations import ended
from flows.lease_wait import GROUP, is_part, leases_on
from flows.pool import WorkPool
from flows.pool_executor import PoolExecutor
from flows.stage_run import StageRun
from flows.tasks import run_stages
from tests.flows.conftest import flaky_run
from tests.flows.test_lease_wait import in_thread, wait_until


class Site(NamedTuple):
    run_file: Path
    overrides: tuple[str, ...]

    def children(self) -> list[FlowRun]:
        """The runs of the pool's deployment, by their ids."""
        name = self.overrides[0].partition("=")[2]
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"regenerate/{name}")
            return client.read_flow_runs(
                flow_run_filter=FlowRunFilter(deployment_id={"any_": [deployment.id]})
            )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_file = flaky_run(tmp_path_factory.mktemp("site"), monkeypatch)
        flow(run_stages)(RunRequest(str(run_file)), ("prompts",))
        yield run_file


@pytest.fixture
def site(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A pool of its own, on which nobody works."""
    monkeypatch.setattr(workers, "POLL_S", 0.05)
    name = f"empty-{uuid4().hex[:6]}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        client.create_deployment(
            client.create_flow_from_name("regenerate"), name, work_pool_name=name
        )
    return Site(
        prompts,
        (
            f"resources.runner.workers={name}",
            "resources.runner.kind=workers",
            "resources.devices.lanes=1",
        ),
    )


def dealt(site: Site, act: Callable[[StageRun, Leases], None]) -> None:
    """Do this in a flow that is about to deal out the stage `answers`."""

    @flow
    def dealing() -> None:
        config = load_run(str(site.run_file), site.overrides)
        run = StageRun(
            RunRequest(str(site.run_file), site.overrides),
            config,
            stage_status(Run(config), "answers"),
        )
        try:
            with leases_on(Run(config).artifact("answers")) as leases:
                act(run, leases)
        finally:
            run.left.set()

    dealing()


def at_work(executor: PoolExecutor, shards: list[int]) -> tuple[threading.Thread, list[Any]]:
    """The lane's thread, and the error that it ended with."""

    def work() -> DeepSpecError | None:
        try:
            executor.work(executor.lanes[0], "answers 0", shards)
        except DeepSpecError as error:
            return error
        return None

    context = copy_context()
    return in_thread(lambda: context.run(work))


def set_state(run: FlowRun, state: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=True)


def test_a_run_whose_making_the_server_could_not_confirm_is_not_made_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    lost = list[str]()

    def unreported(*args: Any, **fields: Any) -> FlowRun:
        made = run_deployment(*args, **fields)
        if not lost:
            lost.append(fields["idempotency_key"])
            raise httpx.ReadTimeout("the answer got lost")
        return made

    def restarting(*args: Any) -> WorkPool:
        if not lost_pools:
            lost_pools.append(args)
            raise httpx.ConnectError("the server is being started again")
        return WorkPool(*args)

    lost_pools = list[Any]()
    monkeypatch.setattr(workers, "run_deployment", unreported)
    monkeypatch.setattr(workers, "WorkPool", restarting)

    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        thread, _ = at_work(executor, [0])
        wait_until(lambda: executor.waiting)
        run.left.set()
        thread.join(60)

    dealt(site, act)
    (child,) = site.children()
    assert child.name == "regenerate run.yaml 0000 (part)" and child.state_name == "Cancelled"


def test_what_an_earlier_try_asked_for_and_nobody_began_is_cancelled(site: Site):
    def act(run: StageRun, leases: Leases) -> None:
        left = PoolExecutor(run, leases)._start(1, [0, 1])
        PoolExecutor(run, leases)
        assert [(child.id, child.state_name) for child in site.children()] == [
            (left.id, "Cancelled")
        ]

    dealt(site, act)


def test_the_shards_of_a_run_that_was_called_crashed_but_lives_are_not_given_to_another_one(
    site: Site,
):
    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        thread, outcome = at_work(executor, [0])
        wait_until(site.children)
        (child,) = site.children()
        set_state(child, Running())
        lease = Lease(
            run=child.name,
            run_id=str(child.id),
            parent_run_id=str(flow_run.id),
            process="elsewhere 1 2 3 4",
        )
        with Leases(Run(run.config).artifact("answers"), lease) as its_own:
            assert its_own.acquire([0]).shards == [0]
            wait_until(lambda: str(child.id) in executor.alive)
            set_state(child, Crashed(message="no sign of life for 540 s"))
            thread.join(1)
            assert thread.is_alive(), "it may still commit the shard"
        thread.join(60)
        assert isinstance(outcome[0], TransientError) and "no sign of life for 540 s" in str(
            outcome[0]
        )

    dealt(site, act)


def test_a_run_that_ended_well_without_its_shards_says_what_may_be_wrong(site: Site):
    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        child = executor._start(1, [3, 4])
        child.state = State(type="COMPLETED", name="Completed", message="All states completed.")
        with pytest.raises(
            TransientError,
            match=r"but of its shards 3-4 are not there\n.*where: .*\n.*fix: .* the same run file",
        ):
            executor._judge(child, [3, 4], {})

    dealt(site, act)


def test_what_may_be_tried_again_of_an_evaluation_is(site: Site):
    """Its units are known to the child alone, and what the child's state says of them does not
    say whether they may be.
    """

    def act(run: StageRun, leases: Leases) -> None:
        run.sharded = False
        executor = PoolExecutor(run, leases)
        child = executor._start(1, None)
        child.state = Failed(
            message="Flow run encountered an exception: ShardsFailed: 1 of 2 shards failed"
        )
        put_failure(executor.artifact, 0, TransientError("the disk was full"))
        with pytest.raises(ShardsFailed) as failed:
            executor._judge(child, [], {})
        assert failed.value.retryable == [0]

    dealt(site, act)


def test_a_webhook_is_told_of_a_run_and_not_of_each_group_that_it_dealt(prefect_server: None):
    trigger = EventTrigger.model_validate(ended("http://127.0.0.1:9/nobody").trigger.model_dump())
    related = [
        {
            "prefect.resource.id": "prefect.flow.1",
            "prefect.resource.role": "flow",
            "prefect.resource.name": "regenerate",
        },
        {
            "prefect.resource.id": "prefect.deployment.1",
            "prefect.resource.role": "deployment",
            "prefect.resource.name": "gpu",
        },
    ]
    told = []
    for name in (
        "regenerate run.yaml",
        "regenerate run.yaml 0000-0002",
        "regenerate run.yaml 0000-0002 (part)",
    ):
        resource = {"prefect.resource.id": "prefect.flow-run.1", "prefect.resource.name": name}
        event = ReceivedEvent(
            occurred=now("UTC"),
            event="prefect.flow-run.Completed",
            id=uuid4(),
            resource=resource,
            related=related,
        )
        told += [name] if trigger.covers(event) else []
    assert told == ["regenerate run.yaml", "regenerate run.yaml 0000-0002"]


def test_only_a_run_that_was_dealt_its_shards_is_a_part_of_another_one():
    asked = flow(is_part)

    @flow
    def a_users_own() -> list[bool]:
        with tags(GROUP):
            dealt = asked()
        return [asked(), dealt]

    assert a_users_own() == [False, True]
    with tags(GROUP):
        assert not asked(), "copied in the UI"
