"""The one loop by which a stage works through its shards: make, check, commit.

A shard is committed (fsync or upload, read back, record) while the next one is made. A shard that
fails is recorded and the others are made; a full disk makes the stage wait, not fail. A kill loses
the shards in flight: at 10,000 shards with a worker dying every minute, each death costs a few
shards of work and nothing else.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.failure_limits import TOO_MANY, failures_allowed, stage_size
from deepspec.artifacts.records import Counts, Record, new_record
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import put_failure, quarantine
from deepspec.artifacts.system_errors import DISK_FULL, transient_system_errors
from deepspec.errors import ArtifactMismatch, DamagedData, DeepSpecError, ShardsFailed
from deepspec.process.events import Report

log = logging.getLogger(__name__)

COMMITS_IN_FLIGHT = 1  # while another shard is made: more would only fill the scratch disk
REPORTED = {"shard", "rows", "tokens", "num_bytes", "seconds", "rejected"}  # of a record


class Work(NamedTuple):
    """One shard to make, and the record of the shard it is made from."""

    shard: int
    upstream: Record

    @property
    def made_from(self) -> str:
        """The checksum of that shard."""
        return self.upstream.checksum


class ShardInput(Protocol):
    """One shard to make, and what it is made from."""

    @property
    def shard(self) -> int:
        """The shard's number."""

    @property
    def made_from(self) -> str:
        """The checksum of what it is made from; the shard is stale once that changes."""


Input = TypeVar("Input", bound=ShardInput)
Input_co = TypeVar("Input_co", bound=ShardInput, covariant=True)
Make = Callable[[Input, Path], Counts]


class Todo(Sized, Iterable[Input_co], Protocol[Input_co]):
    """The shards to make; an iterator may wait until the next one can be made."""


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

    Where a shard made twice is not `repeatable` (sampled by servers, or timed), the first of two
    workers at one shard is kept and the other's is dropped; otherwise a difference between the two
    is an error.

    Raises:
        ShardsFailed: at the end, naming every shard that failed and why; early, where too many have
            failed for good.
    """
    shards = ShardRun(run, artifact, len(todo), report, repeatable=repeatable)
    pending = deque[tuple[ShardInput, Future[Record]]]()
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=1) as committer:
        for work in todo:
            with shards.recording_failure(work.shard):
                made = shards.make(work, make)
                pending.append((work, committer.submit(shards.commit, work, *made, started)))
            started = time.monotonic()
            while len(pending) > COMMITS_IN_FLIGHT:
                shards.settle(*pending.popleft())
            if shards.too_many_failed():
                break
        while pending:
            shards.settle(*pending.popleft())
    if shards.failures:
        raise shards.error()


@dataclass
class ShardRun:
    """One call of `work_through`: how a shard is made and committed, and what came of all."""

    run: Run
    artifact: Artifact
    total: int
    report: Report
    repeatable: bool
    failures: dict[int, dict[str, Any]] = field(default_factory=dict)
    num_ended: int = 0
    rows: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.resources = self.run.config.resources
        self.stage = self.artifact.key.stage

    def make(self, work: Input, make: Make[Input]) -> tuple[Path, Counts, ExitStack]:
        """A staged file with the shard, which exists until the stack is closed.

        Waits until the disk has `min_free_gb` left, and makes the shard again where it was full.
        """
        while True:
            wanted = self.resources.storage.min_free_gb
            while (free := self.artifact.store.free_bytes() / 1e9) < wanted:
                self._pause(f"{free:.2f} GB are free, resources.storage.min_free_gb is {wanted:g}")
            with ExitStack() as stack:
                local = stack.enter_context(self.artifact.store.staged())
                try:
                    return local, make(work, local), stack.pop_all()
                except DamagedData as error:
                    if local.exists():
                        aside = quarantine(self.artifact, work.shard, local)
                        error.where += f"; set aside as {aside}"
                    raise
                except OSError as error:
                    if error.errno not in DISK_FULL:
                        raise
            # What was written of it is deleted by now: that alone may have made room.
            self._pause(f"the disk is full, shard {work.shard} will be made again")

    def commit(
        self, work: ShardInput, local: Path, counts: Counts, staged: ExitStack, started: float
    ) -> Record:
        """Publish a staged shard, waiting while the disk is full."""
        key, upstream, seconds = self.artifact.key, work.made_from, time.monotonic() - started
        with staged, transient_system_errors(f"shard {work.shard}"):
            record = new_record(key, work.shard, local, counts, upstream=upstream, seconds=seconds)
            while True:
                try:
                    return self.artifact.put(record, local, counts.index_rows)
                except ArtifactMismatch:
                    first = self.artifact.record(work.shard)
                    if self.repeatable or first is None:
                        raise
                    log.info("stage=%s shard=%d: kept another worker's", self.stage, work.shard)
                    return first
                except OSError as error:
                    if error.errno not in DISK_FULL:
                        raise
                    why = f"the disk is full ({error.strerror})"
                    self._pause(f"{why}, shard {work.shard} waits to be committed")

    def settle(self, work: ShardInput, commit: Future[Record]) -> None:
        """Count and report a commit that has ended."""
        with self.recording_failure(work.shard):
            record = commit.result()
            self.rows += record.rows
            self.tokens += record.tokens
            fields = record.model_dump(include=REPORTED)
            counts = " ".join(f"{key}={value}" for key, value in fields.items())
            log.info("stage=%s %s", self.stage, counts)
            self.report({"event": "shard", "stage": self.stage, **fields})
            self._progress()

    @contextmanager
    def recording_failure(self, shard: int) -> Iterator[None]:
        """Keep an error of the shard in the artifact and in `failures`; the others are made."""
        try:
            with transient_system_errors(f"shard {shard}"):
                yield
        except DeepSpecError as error:
            log.error("stage=%s shard=%d failed: %s", self.stage, shard, error.what)
            # A full disk must not turn a note about one shard into the end of all.
            with suppress(OSError):
                put_failure(self.artifact, shard, error)
            self.failures[shard] = error.to_json()
            fields = {"shard": shard, "what": error.what, "transient": error.transient}
            self.report({"event": "failed", "stage": self.stage, **fields})
            self._progress()

    def too_many_failed(self) -> bool:
        """Whether no more shards are to be begun."""
        lost = sum(not failure["transient"] for failure in self.failures.values())
        return lost > 0 and lost > self.allowed

    @cached_property
    def allowed(self) -> int:
        """Shards that may fail for good; found only once one has, by listings of the stage."""
        committed = self.num_ended - len(self.failures)
        num_shards = stage_size(self.artifact, self.total - committed)
        return failures_allowed(self.resources.retries, num_shards)

    def error(self) -> ShardsFailed:
        """The error that names every failed shard, and the command that makes them."""
        reasons = [f"shard {shard}: {found['what']}" for shard, found in self.failures.items()]
        left = self.total - self.num_ended
        shards = "" if left else f" --shards {','.join(map(str, self.failures))}"
        fix = f"run `{self.run.command(self.stage)}{shards}`"
        early = f"; {left} were not begun, because {TOO_MANY} ({self.allowed})" if left else ""
        what = f"{len(self.failures)} of {self.total} shards failed{early}: {'; '.join(reasons)}"
        return ShardsFailed(what, where=self.artifact.url, fix=fix, failures=self.failures)

    def _progress(self) -> None:
        self.num_ended += 1
        event = {
            "event": "progress",
            "stage": self.stage,
            "done": self.num_ended,
            "total": self.total,
            "unit": "shards",
            "rows": self.rows,
            "tokens": self.tokens,
        }
        self.report(event)

    def _pause(self, why: str) -> None:
        url = self.artifact.url
        log.warning("stage=%s paused: %s; it continues once %s has room", self.stage, why, url)
        self.report({"event": "paused", "stage": self.stage, "why": why})
        time.sleep(self.resources.storage.space_poll_s)
