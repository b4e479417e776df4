"""The one loop by which a stage works through its shards: make, check, commit, go on.

Committing (fsync or upload, read back, record) runs beside the making of the next shard. A shard
that fails is noted and the others go on; a full disk makes the stage wait, not fail. Killed at any
point, what is lost is the shards in flight: at 10,000 shards with a worker dying every minute each
of them costs a few shards of work and nothing else.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import input_artifact
from deepspec.artifacts.records import Counts, Record, describe
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import put_failure, quarantine
from deepspec.config.retries import RetriesConfig
from deepspec.errors import (
    ArtifactMismatch,
    DamagedData,
    DeepSpecError,
    ShardsFailed,
    StoreError,
    TransientError,
)
from deepspec.process.events import Report
from deepspec.storage.store import Store

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
TOO_MANY = "more failed for good than resources.retries.max_failed allows"
# shards that may fail for good whatever their share: a small stage is worked through
FEW_FAILED = 10
COMMITS_IN_FLIGHT = 1  # beside the shard being made: more would only fill the scratch disk


class Work(NamedTuple):
    """One shard to make, and the record of the shard it is made from."""

    shard: int
    upstream: Record


class ShardInput(Protocol):
    """What one shard is made from: `Work`, or a tuple that adds to it."""

    @property
    def shard(self) -> int: ...
    @property
    def upstream(self) -> Record: ...


Input = TypeVar("Input", bound=ShardInput)
Input_co = TypeVar("Input_co", bound=ShardInput, covariant=True)
Make = Callable[[Input, Path], Counts]


class Todo(Protocol[Input_co]):
    """The shards to make; an iterator may wait until the next one can be made."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Input_co]: ...


def work_through(
    run: Run,
    artifact: Artifact,
    todo: Todo[Input],
    make: Make[Input],
    report: Report,
    *,
    repeatable: bool = True,
) -> None:
    """Make and commit each shard.

    Where a shard made twice is not `repeatable` (sampled by servers, or timed), of two workers at
    the same shard the first one's stands, and the other's is dropped; otherwise a difference
    between the two is an error.

    Raises:
        ShardsFailed: at the end, naming every shard that failed and why; early, where too many have
            failed for good.
    """
    shards, pending = (
        ShardRun(run, artifact, len(todo), report, repeatable=repeatable),
        deque[tuple[ShardInput, Future[Record]]](),
    )
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=1) as committer:
        for work in todo:
            with shards.noting_failure(work):
                local, counts, staged = shards.made(work, make)
                pending.append(
                    (work, committer.submit(shards.commit, work, local, counts, started, staged))
                )
            started = time.monotonic()
            while len(pending) > COMMITS_IN_FLIGHT:
                shards.settle(*pending.popleft())
            if shards.too_many_failed():
                break
        while pending:
            shards.settle(*pending.popleft())
    if shards.failures:
        raise shards.failed()


class ShardRun:
    """What one call of `work_through` keeps count of."""

    def __init__(
        self, run: Run, artifact: Artifact, total: int, report: Report, *, repeatable: bool
    ) -> None:
        self.repeatable = repeatable
        self.run, self.resources = run, run.config.resources
        self.artifact, self.total, self.report = artifact, total, report
        self.failures: dict[int, dict[str, Any]] = {}
        self.ended, self.rows, self.tokens = 0, 0, 0

    def made(self, work: Input, make: Make[Input]) -> tuple[Path, Counts, ExitStack]:
        """A staged file with the shard, which lives until the stack is closed; while the disk
        is full, waits and makes it again.
        """
        while True:
            self.wait_for_space()
            with ExitStack() as stack:
                local = stack.enter_context(self.artifact.store.staged())
                try:
                    return local, make(work, local), stack.pop_all()
                except DamagedData as error:
                    error.where += (
                        f"; set aside as {quarantine(self.artifact, work.shard, local)}"
                        if local.exists()
                        else ""
                    )
                    raise
                except OSError as error:
                    if error.errno not in FULL:
                        raise
            # What was written of it is gone by now: that alone may have made room.
            self._pause(f"the disk is full, shard {work.shard} will be made again")

    def commit(
        self, work: ShardInput, local: Path, counts: Counts, started: float, staged: ExitStack
    ) -> Record:
        with staged, transient_system_errors(f"shard {work.shard}"):
            record = describe(
                self.artifact.key, work.shard, local, counts, upstream=work.upstream.checksum
            )
            record = record.taking(time.monotonic() - started)
            while True:
                try:
                    return self.artifact.put(record, local, counts.index_rows)
                except ArtifactMismatch:
                    first = self.artifact.record(work.shard)
                    if self.repeatable or first is None:
                        raise
                    log.info(
                        "stage=%s shard=%d: another worker was first, and its shard stands",
                        self.artifact.key.stage,
                        work.shard,
                    )
                    return first
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    self._pause(
                        f"the disk is full ({error.strerror}), shard {work.shard} waits to be committed"
                    )

    def settle(self, work: ShardInput, future: Future[Record]) -> None:
        """Take note of how a commit ended."""
        with self.noting_failure(work):
            record = future.result()
            self.rows, self.tokens = self.rows + record.rows, self.tokens + record.tokens
            fields = record.model_dump(
                include={"shard", "rows", "tokens", "num_bytes", "seconds", "rejected"}
            )
            log.info(
                "stage=%s %s",
                self.artifact.key.stage,
                " ".join(f"{key}={value}" for key, value in fields.items()),
            )
            self.report({"event": "shard", "stage": self.artifact.key.stage, **fields})
            self._progress()

    @contextmanager
    def noting_failure(self, work: ShardInput) -> Iterator[None]:
        """An error of a shard is kept beside the artifact and in `failures`; the other shards
        go on.
        """
        try:
            with transient_system_errors(f"shard {work.shard}"):
                yield
        except DeepSpecError as error:
            log.error(
                "stage=%s shard=%d failed: %s", self.artifact.key.stage, work.shard, error.what
            )
            # a full disk must not turn a note about one shard into the end of all
            with suppress(OSError):
                put_failure(self.artifact, work.shard, error)
            self.failures[work.shard] = {**error.to_json(), "transient": error.transient}
            fields = {"shard": work.shard, "what": error.what, "transient": error.transient}
            self.report({"event": "failed", "stage": self.artifact.key.stage, **fields})
            self._progress()

    def too_many_failed(self) -> bool:
        lost = sum(not failure["transient"] for failure in self.failures.values())
        return lost > few_failed(self.resources.retries) and lost > self.allowed

    @cached_property
    def allowed(self) -> int:
        """How many shards may fail for good: looked up once the share can matter, for it takes
        listings of the whole stage.
        """
        committed_here = self.ended - len(self.failures)
        return failures_allowed(
            self.resources.retries, stage_size(self.artifact, self.total - committed_here)
        )

    def _progress(self) -> None:
        self.ended += 1
        counts = {
            "done": self.ended,
            "total": self.total,
            "unit": "shards",
            "rows": self.rows,
            "tokens": self.tokens,
        }
        self.report({"event": "progress", "stage": self.artifact.key.stage, **counts})

    def wait_for_space(self) -> None:
        """Return once the store has `min_free_gb` left."""
        while (free := free_gb(self.artifact.store)) < self.resources.storage.min_free_gb:
            self._pause(
                f"{free:.2f} GB are free where resources.storage.min_free_gb asks for {self.resources.storage.min_free_gb:g}"
            )

    def _pause(self, why: str) -> None:
        log.warning(
            "stage=%s paused: %s; it goes on by itself once there is room at %s",
            self.artifact.key.stage,
            why,
            self.artifact.url,
        )
        self.report({"event": "paused", "stage": self.artifact.key.stage, "why": why})
        time.sleep(self.resources.storage.space_poll_s)

    def failed(self) -> ShardsFailed:
        reasons = "; ".join(
            f"shard {shard}: {failure['what']}" for shard, failure in self.failures.items()
        )
        left = self.total - self.ended
        shards = "" if left else f" --shards {','.join(map(str, self.failures))}"
        fix = f"run `{self.run.command(self.artifact.key.stage)}{shards}`"
        early = f"; {left} were not begun, because {TOO_MANY} ({self.allowed})" if left else ""
        what = f"{len(self.failures)} of {self.total} shards failed{early}: {reasons}"
        return ShardsFailed(what, where=self.artifact.url, fix=fix, failures=self.failures)


def failures_allowed(retries: RetriesConfig, num_shards: int) -> int:
    """Shards of a stage of `num_shards` that may fail for good before no more are begun."""
    return max(few_failed(retries), int(retries.max_failed * num_shards))


def few_failed(retries: RetriesConfig) -> int:
    """Shards that may fail for good whatever their share; who allows none is taken at their
    word.
    """
    return FEW_FAILED if retries.max_failed else 0


def stage_size(artifact: Artifact, num_todo: int) -> int:
    """Shards of the whole stage: a worker that was given some of the missing ones finds the
    others in the stage before.
    """
    before = [
        len(input_artifact(artifact.store, entry).record_shards())
        for entry in artifact.key.inputs[:1]
    ]
    return max([len(artifact.record_shards()) + num_todo, *before])


def free_gb(store: Store) -> float:
    """Free space (GB) where the next shard is written first: the store's own disk, or the
    scratch disk of a remote one.
    """
    return store.free_bytes() / 1e9


@contextmanager
def transient_system_errors(what: str) -> Iterator[None]:
    """Lost connections and time-outs come back as TransientError, so that the shard is tried
    again; a sick disk as StoreError.
    """
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        raise TransientError(
            f"{type(error).__name__}: {error}", where=what, fix="it is tried again by itself"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{type(error).__name__}: {error}",
            where=what,
            fix="check the disk that holds the store",
        ) from error
