"""Child runs: runs of a stage's deployment to which this run assigns groups of shards.

They share the store and the Prefect server. The error of a child run travels as data, in an
artifact of the run on the server.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelling, State

from deepspec.errors import ConfigError, DeepSpecError, error_from_json
from flows.reporting import best_effort

# tag of a child run, because a user's own flow may start runs of any deployment, too
GROUP = "group"
PAUSE_S = 4.0  # before a server that is away is called again
ERROR_TYPE = "deepspec-error"  # of an artifact; it has no key, so no list of artifacts shows it
T = TypeVar("T")


def is_part() -> bool:
    """Whether this run is a child run."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and GROUP in run.tags and run.parent_task_run_id is not None


def start_child(
    deployment_id: UUID, name: str, parameters: Mapping[str, Any], *, key: str
) -> FlowRun:
    """A scheduled run of the deployment; the same one again for the same `key`."""
    return run_deployment(
        deployment_id,
        parameters=dict(parameters),
        timeout=0,
        flow_run_name=name,
        idempotency_key=key,
        tags=["deepspec", GROUP],
    )


def read_child(child: FlowRun) -> FlowRun:
    """The child run as it is now."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(child.id)


def set_child_state(child: FlowRun, state: State[Any]) -> None:
    """Proposes the state; the server may refuse it where the run has ended."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(child.id, state)


def cancel_unbegun() -> None:
    """Cancel the child runs of an earlier try of this run that no worker has begun: they would make
    what is assigned again now.
    """
    wanted = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(flow_run.id)]),
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])
        ),
    )
    with get_client(sync_client=True) as client:
        for child in client.read_flow_runs(flow_run_filter=wanted):
            if GROUP in child.tags:
                client.set_flow_run_state(child.id, Cancelling())


@contextlib.contextmanager
def leaving_error_to_parent() -> Iterator[None]:
    """Where this run is a child run, the error that leaves the block is kept with it, for
    `read_error` in its parent.
    """
    try:
        yield
    except DeepSpecError as error:
        if is_part():
            wanted = ArtifactCreate(type=ERROR_TYPE, flow_run_id=flow_run.id, data=error.to_json())
            with best_effort(), get_client(sync_client=True) as client:
                client.create_artifact(wanted)
        raise


def read_error(child: FlowRun) -> DeepSpecError | None:
    """The error that the child run left last, as its own class; None if it left none."""
    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[child.id]),
        type=ArtifactFilterType(any_=[ERROR_TYPE]),
    )
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=1
        )
    return error_from_json(found[0].data) if found else None


def patiently(call: Callable[[], T], pause: Callable[[float], None], *, where: str) -> T:
    """What the server answers, which may be away for a while: nothing is lost by waiting.

    Raises:
        ConfigError: it refuses the request itself.
        Exception: whatever `pause` raises in order to end the waiting.
    """
    while True:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.is_client_error:
                raise ConfigError(
                    f"Prefect refuses the child run: {error}",
                    where=where,
                    fix="run `python -m flows.setup` again",
                ) from None
            get_run_logger().warning("the Prefect server: %s", error)
        except httpx.HTTPError as error:
            get_run_logger().warning("the Prefect server is away: %s", error)
        pause(PAUSE_S)
