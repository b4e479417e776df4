"""Child runs on a pool without a worker: none is started twice, none's shards are given to another
one, and the error of one reaches its parent as it was.
"""

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
from deepspec.artifacts.run import open_run
from deepspec.artifacts.status import stage_status
from deepspec.errors import ChildFailed, DeepSpecError, ShardsFailed, StoreError, TransientError
from deepspec.process.launch import RunRequest
from flows import child_runs, pool_executor
from flows.automations import ended
from flows.child_runs import GROUP, is_part, leaving_error_to_parent, read_error
from flows.lease_wait import leases_on
from flows.pool_executor import PoolExecutor
from flows.stage_run import StageRun
from flows.tasks import run_stages
from flows.work_pool import WorkPool
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
    """A pool of its own, without a worker."""
    monkeypatch.setattr(pool_executor, "POLL_S", 0.05)
    monkeypatch.setattr(child_runs, "PAUSE_S", 0.1)
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


def assigning(site: Site, act: Callable[[StageRun, Leases], None]) -> None:
    """Do this in a flow that is about to assign the shards of `answers`."""

    @flow
    def parent() -> None:
        run = open_run(str(site.run_file), site.overrides)
        request = RunRequest(str(site.run_file), site.overrides)
        stage_run = StageRun(request, run, stage_status(run, "answers"))
        try:
            with leases_on(run.artifact("answers")) as leases:
                act(stage_run, leases)
        finally:
            stage_run.left.set()

    parent()


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


def test_a_child_run_whose_start_the_server_could_not_confirm_is_not_started_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    lost = list[str]()

    def unconfirmed(*args: Any, **fields: Any) -> FlowRun:
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
    monkeypatch.setattr(child_runs, "run_deployment", unconfirmed)
    monkeypatch.setattr(pool_executor, "WorkPool", restarting)

    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        thread, _ = at_work(executor, [0])
        wait_until(lambda: executor.waiting)
        run.left.set()
        thread.join(60)

    assigning(site, act)
    (child,) = site.children()
    assert child.name == "regenerate run.yaml 0000 (part)" and child.state_name == "Cancelled"


def test_child_runs_of_an_earlier_try_that_no_worker_began_are_cancelled(site: Site):
    def act(run: StageRun, leases: Leases) -> None:
        left = PoolExecutor(run, leases)._start([0, 1])
        PoolExecutor(run, leases)
        assert [(child.id, child.state_name) for child in site.children()] == [
            (left.id, "Cancelled")
        ]

    assigning(site, act)


def test_the_shards_of_a_run_that_is_marked_crashed_but_lives_are_not_given_to_another_one(
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
        with Leases(run.artifact, lease) as its_own:
            assert its_own.acquire([0]).shards == [0]
            wait_until(lambda: str(child.id) in executor.alive)
            set_state(child, Crashed(message="no sign of life for 540 s"))
            thread.join(1)
            assert thread.is_alive(), "it may still commit the shard"
        thread.join(60)
        assert isinstance(outcome[0], TransientError) and "no sign of life for 540 s" in str(
            outcome[0]
        )

    assigning(site, act)


def test_a_run_that_ended_well_without_its_shards_says_what_may_be_wrong(site: Site):
    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        child = executor._start([3, 4])
        child.state = State(type="COMPLETED", name="Completed", message="All states completed.")
        with pytest.raises(
            TransientError,
            match=r"but of its shards 3-4 are not there\n.*where: .*\n.*fix: .* the same run file",
        ):
            executor._check(child, [3, 4])

    assigning(site, act)


@flow
def failing(error: DeepSpecError) -> None:
    with leaving_error_to_parent():
        raise error


def failed_child(error: DeepSpecError) -> FlowRun:
    """A child run that ended with this error."""
    with tags(GROUP):
        state = failing(error, return_state=True)
    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id)


def raised(site: Site, error: DeepSpecError) -> DeepSpecError:
    """What its parent raises for a child that was to make shards 3 and 4."""
    caught = list[DeepSpecError]()

    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        with pytest.raises(DeepSpecError) as found:
            executor._check(failed_child(error), [3, 4])
        caught.append(found.value)

    assigning(site, act)
    return caught[0]


@pytest.mark.parametrize(
    "error",
    [
        StoreError("cannot write\nto the disk", where="store x", fix="choose another"),
        TransientError("gone"),
        ChildFailed("answers ended with exit code 1", fix="see its last lines"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_child_runs_error_is_raised_by_its_parent_as_it_was(site: Site, error: DeepSpecError):
    found = raised(site, error)
    assert (type(found), found.to_json()) == (type(error), error.to_json())


def test_shards_that_failed_in_a_child_run_keep_their_reasons_and_the_others_may_be_tried(
    site: Site,
):
    bad = {"what": "the prompt cannot be rendered", "transient": False}
    found = raised(site, ShardsFailed("1 failed", failures={4: bad, 9: bad}))
    assert isinstance(found, ShardsFailed) and found.retryable == [3]
    assert found.failures[4] == bad and "ended Failed" in found.failures[3]["what"]


def test_a_child_run_that_left_no_error_is_named_with_the_message_of_its_state(site: Site):
    def act(run: StageRun, leases: Leases) -> None:
        executor = PoolExecutor(run, leases)
        child = executor._start([3, 4])
        child.state = Failed(message="Flow run encountered an exception: KeyError: 'x'")
        with pytest.raises(ChildFailed, match=r"ended Failed: .* KeyError: 'x'"):
            executor._check(child, [3, 4])

    assigning(site, act)


def test_what_may_be_tried_again_of_an_evaluation_is(site: Site):
    """Its units are known to the child alone: its error names them."""

    def act(run: StageRun, leases: Leases) -> None:
        run.sharded = False
        executor = PoolExecutor(run, leases)
        full = {0: {"what": "the disk was full", "transient": True}}
        with pytest.raises(ShardsFailed) as failed:
            executor._check(failed_child(ShardsFailed("1 of 2 failed", failures=full)), [])
        assert failed.value.retryable == [0]

    assigning(site, act)


def test_a_run_that_a_user_started_leaves_no_error_for_a_parent(site: Site):
    state = failing(TransientError("gone"), return_state=True)
    with get_client(sync_client=True) as client:
        assert read_error(client.read_flow_run(state.state_details.flow_run_id)) is None


def test_a_webhook_is_called_for_a_run_and_not_for_each_of_its_child_runs(prefect_server: None):
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
    called = []
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
        called += [name] if trigger.covers(event) else []
    assert called == ["regenerate run.yaml", "regenerate run.yaml 0000-0002"]


def test_only_a_run_that_another_one_assigned_its_shards_is_a_part_of_it():
    asked = flow(is_part)

    @flow
    def a_users_own() -> list[bool]:
        with tags(GROUP):
            child = asked()
        return [asked(), child]

    assert a_users_own() == [False, True]
    with tags(GROUP):
        assert not asked(), "copied in the UI"
