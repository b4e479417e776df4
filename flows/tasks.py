"""Stages as Prefect tasks: a task is a group of missing shards, worked through by one guarded child.

What is missing is read from the store before anything is submitted, and again at the end: a task's own state decides
nothing but whether it is tried again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import get_run_logger, task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from deepspec.aside import folder_beside
from deepspec.config import RunConfig
from deepspec.errors import ConfigError, DeepSpecError, ShardsFailed
from deepspec.gpus import visible_gpus
from deepspec.launch import Request, deal, run_child, scope, shard_list
from deepspec.lineage import artifact_of
from deepspec.stages import SHARDED, StageStatus, parse_shards, require_sealed, stage_status, stages_of
from deepspec.work import TOO_MANY, failures_allowed
from flows.assets import publish_asset
from flows.reporting import Board, StageOutcome, State, publish_failure, publish_stages, show_nothing_to_do
from flows.request import open_run
from flows.selection import SELECTABLE, selected

JITTER = 0.3  # share of a retry's delay by which it may vary, so that many tasks do not come back at once
MAX_FORWARDED = 100  # log lines of one child that go to the Prefect server; its file has them all
MAX_NAMED = 20  # failed shards whose reasons are spelt out


def run_stages(request: Request, chosen: Sequence[str], shards: str | int = "") -> list[StageOutcome]:
    """Those of the chosen stages that the run has, in order, each sealed; the first that fails ends the run.

    With `shards` only these are made, and the stages after one that is not whole by then are left for another run.

    Raises:
        DeepSpecError: the request is wrong (before any work), or a stage failed.
    """
    asked, config = parse_shards(str(shards)), open_run(request)
    outcomes: list[StageOutcome] = []
    for stage in (stage for stage in stages_of(config) if stage in chosen):
        if asked and outcomes and not outcomes[-1].status.sealed:
            get_run_logger().warning("%s: left out, because shards of %s are still missing", stage, outcomes[-1].status.stage)
            break
        try:
            outcomes.append(run_stage(request, config, stage, asked))
        except DeepSpecError as error:
            publish_failure(config.name, error)
            publish_stages(config.name, [*outcomes, StageOutcome(stage_status(config, stage), "failed", 0.0)])
            raise
    publish_stages(config.name, outcomes)
    return outcomes


def run_stage(request: Request, config: RunConfig, stage: str, asked: Sequence[int] = ()) -> StageOutcome:
    """The stage, with whatever was missing of it (or of the asked shards) made, and the artifact sealed if it is whole.

    Raises:
        ShardsFailed: shards are still missing; all others are committed.
        DeepSpecError: the stage could not be run at all.
    """
    started, before = time.monotonic(), stage_status(config, stage)
    todo = selected(config, before, asked)
    if before.sealed or before.in_training or (asked and not todo.missing):
        state: State = "in training" if before.in_training else "already done"
        show_nothing_to_do(before, state)
        return StageOutcome(before, state, 0.0)
    require_sealed(config, stage)
    run = StageRun(request, config, todo, some=bool(asked))
    run.work()
    after = stage_status(config, stage)
    left = selected(config, after, asked)
    finished = after.sealed or (bool(asked) and not left.missing)
    run.board.close("done" if finished else "failed")
    if not finished:
        raise run.failure(left).with_traceback(None)
    if after.sealed:
        publish_asset(artifact_of(config, stage))
    return StageOutcome(after, "done", time.monotonic() - started)


class StageRun:
    """One stage in one flow run: what its tasks share, and why shards of it failed."""

    def __init__(self, request: Request, config: RunConfig, before: StageStatus, *, some: bool = False) -> None:
        self.request, self.config, self.stage = request, config, before.stage
        self.sharded = before.stage in SHARDED and bool(before.missing)
        whole = before.missing if some and before.stage in SELECTABLE else None
        self.groups = deal(before.missing, config.resources.shards_per_task) if self.sharded else [whole]
        self.failures: dict[int, dict[str, Any]] = {}
        self.lost: set[int] = set()  # failed for good; one of a group whose child failed as a whole: one shard may have brought it down
        self.allowed = failures_allowed(config.resources, before.committed + len(before.missing))
        self.error: DeepSpecError | None = None
        devices = visible_gpus() if config.resources.device != "cpu" else []
        self.num_lanes = config.resources.lanes or max(1, len(devices))
        self.lanes: SimpleQueue[str | None] = SimpleQueue()
        for lane in range(self.num_lanes):
            self.lanes.put(devices[lane % len(devices)] if devices and self.sharded else None)
        self.secrets = api_key(config) if self.stage == "answers" else {}
        self.board = Board(config.name, before, sharded=self.sharded)

    def work(self) -> None:
        """Run a task per group; a group that fails does not stop the others."""
        settings = self.config.resources
        attempt = run_group.with_options(
            retries=settings.retries, retry_delay_seconds=exponential_backoff(settings.retry_delay_s),
            retry_jitter_factor=JITTER, retry_condition_fn=worth_another_try,
        )  # fmt: skip
        # The scope is left first: with its children ended, the runner's threads come to their end as well.
        with ThreadPoolTaskRunner(max_workers=self.num_lanes) as runner, scope(settings.stop_s):
            wait([runner.submit(attempt, {"name": self.name(group), "run": self, "shards": group}) for group in self.groups])

    def name(self, shards: Sequence[int] | None) -> str:
        return self.stage if shards is None else f"{self.stage} {shard_list(shards)}"

    def log_path(self, shards: Sequence[int] | None) -> Path:
        return folder_beside(artifact_of(self.config, self.stage), "logs") / f"{self.name(shards)[:80].replace(' ', '-')}.log"

    @contextlib.contextmanager
    def lane(self) -> Iterator[dict[str, str]]:
        """The environment that pins a child to its lane's GPU, and gives it the servers' key."""
        device = self.lanes.get()
        try:
            yield {"DEEPSPEC_EVENTS": "1"} | self.secrets | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
        finally:
            self.lanes.put(device)

    def note(self, error: DeepSpecError, shards: Sequence[int] | None) -> None:
        if isinstance(error, ShardsFailed) and shards is not None:
            self.failures.update(error.failures)
            self.lost |= set(self.given_up(list(error.failures)))
            return
        reason = {**error.to_json(), "transient": error.transient}
        self.failures.update({shard: reason for shard in shards or ()})
        if shards is None or not error.transient:
            self.error = error
            self.lost |= set((shards or ())[:1])

    def given_up(self, shards: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Those of the shards that failed for good: trying them again would end the same way."""
        return {shard: self.failures[shard] for shard in shards if shard in self.failures and not self.failures[shard].get("transient")}

    def too_many_failed(self) -> bool:
        """Whether no more shards are to be begun; those under way are finished."""
        return len(self.lost) > self.allowed

    def failure(self, after: StageStatus) -> DeepSpecError:
        """Why the stage is not finished, naming every missing shard and how to resume."""
        if self.error is not None:
            return self.error
        stopped = self.too_many_failed()
        unknown = {"what": "it was not begun" if stopped else "its task did not end; see the flow run's log", "transient": True}
        failures = {shard: self.failures.get(shard, unknown) for shard in after.missing}
        named = [shard for shard in failures if not stopped or shard in self.failures]
        reasons = [f"shard {shard}: {failures[shard]['what']}" for shard in named[:MAX_NAMED]]
        more = [f"and {len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
        early = f"; {len(failures) - len(named)} were not begun, because {TOO_MANY} ({self.allowed})" if stopped else ""
        what = f"{len(named)} of {after.committed + len(failures)} shards of the stage {self.stage!r} failed{early}: "
        fix = f"run `{self.request.shown(self.stage, after.missing)}`, or the same run again: it does only what is missing"
        return ShardsFailed(what + "; ".join([*reasons, *more]), where=after.artifact_url, fix=fix, failures=failures)


@task(name="shards", task_run_name="{name}", persist_result=False, cache_policy=NO_CACHE)
def run_group(name: str, run: StageRun, shards: list[int] | None) -> None:
    """One child for a group of shards (None: the stage as a whole); a retry leaves out what failed for good."""
    if run.too_many_failed():
        raise ShardsFailed(f"{name}: not begun, because {TOO_MANY}")
    todo = None if shards is None else [shard for shard in shards if shard not in run.given_up(shards)]
    path = run.log_path(shards)
    get_run_logger().info("%s: started, full log in %s", name, path)
    try:
        with run.lane() as env:
            command = run.request.command(run.stage, todo)
            hear = functools.partial(run.board.hear, lane=name)
            run_child(command, on_event=hear, on_line=forward_warnings(path), env=env, log_path=path)
    except DeepSpecError as error:
        run.note(error, todo)
        raise
    if lost := run.given_up(shards or ()):
        raise ShardsFailed(f"shards {shard_list(list(lost))} failed for good", failures=lost)
    get_run_logger().info("%s: done", name)


def worth_another_try(_task: object, _task_run: object, state: Any) -> bool:
    """Whether a failed attempt may end better if it is made again."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, ShardsFailed):
        return bool(error.retryable)
    return isinstance(error, DeepSpecError) and error.transient


def forward_warnings(path: Path) -> Callable[[str], None]:
    """A child's warnings and errors into the run's log, up to a limit."""
    logger, left = get_run_logger(), iter(range(MAX_FORWARDED, -1, -1))

    def forward(line: str) -> None:
        if " WARNING " in line or " ERROR " in line:
            remaining = next(left, None)
            if remaining is not None:
                logger.warning(line if remaining else f"more warnings follow in {path}")

    return forward


def api_key(config: RunConfig) -> dict[str, str]:
    """The variable that the answers stage reads the servers' key from, if a Prefect block holds it.

    Raises:
        ConfigError: there is no such block.
    """
    settings = config.resources
    if settings.api_key_secret is None:
        return {}
    try:
        secret = Secret.load(settings.api_key_secret)
    except ValueError:
        where, fix = f"resources.api_key_secret {settings.api_key_secret}", "make it in the UI under Blocks, or correct the name"
        raise ConfigError("there is no Secret block of this name on the Prefect server", where=where, fix=fix) from None
    return {settings.api_key_env: str(secret.get())}
