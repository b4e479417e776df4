"""What a run shows while it works and at its end: progress for who watches it, artifacts for the Prefect UI.

Artifacts are a help, not a condition: a server that does not take one is noted in the log, and the run goes on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from deepspec.events import answering_note, words_of
from deepspec.stages import StageStatus

log = logging.getLogger(__name__)

ARTIFACT_PAUSE_S = 5.0  # between two updates of a progress artifact
REQUEST_S = 5.0
ENVELOPE = ("event", "stage", "done", "total", "unit")

State = Literal["running", "done", "already done", "in training", "failed"]


class Progress(NamedTuple):
    """How far a stage is; `numbers` are whatever its children count (rows, tokens, loss, ...)."""

    stage: str
    state: State
    done: int
    total: int
    unit: str
    numbers: Mapping[str, float]
    note: str = ""
    """What the children say of the shards under way, in words."""


class StageOutcome(NamedTuple):
    """What became of a stage in this run."""

    status: StageStatus
    state: State
    seconds: float


Watcher = Callable[[Progress], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Everything that a run started in this block reports is shown to `watcher` too."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def show(progress: Progress) -> None:
    if watcher := _watcher.get():
        watcher(progress)


def show_nothing_to_do(status: StageStatus, state: State) -> None:
    show(Progress(status.stage, state, 1, 1, "", {}))


class Board:
    """Adds up what the children of one stage say, and shows it."""

    def __init__(self, run_name: str, before: StageStatus, *, sharded: bool) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, Mapping[str, Any]] = {}
        self._sharded, self._committed, self._seen = sharded, before.committed, set[int]()
        total = before.committed + len(before.missing) if sharded else 0
        self.progress = Progress(before.stage, "running", before.committed if sharded else 0, total, "shards" if sharded else "", {})
        self._artifact = _ProgressArtifact(f"{run_name}-{before.stage}", f"{before.stage}: {before.artifact_url}")
        self._show()

    def hear(self, event: Mapping[str, Any], *, lane: str = "") -> None:
        """Take in one event of a lane's child; may be called from several threads."""
        with self._lock:
            if event["event"] == "shard" and self._sharded:
                self._hear_shard(event)
            elif event["event"] == "answering":
                self._under_way[lane] = event
                self.progress = self.progress._replace(note=answering_note(list(self._under_way.values())))
            elif event["event"] == "progress" and not self._sharded:
                numbers = {key: value for key, value in event.items() if key not in ENVELOPE}
                counted = {"done": event["done"], "total": event["total"] or 0, "unit": event.get("unit", "")}  # total: null while unknown
                self.progress = self.progress._replace(**counted, numbers=numbers)
            else:
                return
            self._show()

    def _hear_shard(self, event: Mapping[str, Any]) -> None:
        """Children count their own shards from zero, and again after a retry; here every shard counts once."""
        if event["shard"] in self._seen:
            return
        self._seen.add(event["shard"])
        sums = {key: self.progress.numbers.get(key, 0) + event.get(key, 0) for key in ("rows", "tokens", "num_bytes")}
        self.progress = self.progress._replace(done=self._committed + len(self._seen), numbers=sums)

    def say(self, note: str) -> None:
        """Show a sentence beside the numbers, until another one takes its place."""
        with self._lock:
            self.progress = self.progress._replace(note=note)
            self._show()

    def close(self, state: State) -> None:
        with self._lock:
            total = max(self.progress.total, self.progress.done, 1)
            done = self.progress.done if state == "failed" else total
            self.progress = self.progress._replace(state=state, done=done, total=total, note="")
            self._show()
            self._artifact.update(self.progress, pause_s=0.0)

    def _show(self) -> None:
        show(self.progress)
        self._artifact.update(self.progress, pause_s=ARTIFACT_PAUSE_S)


class _ProgressArtifact:
    """A live progress artifact, updated at most every few seconds."""

    def __init__(self, name: str, description: str) -> None:
        self._description, self._updated = description, time.monotonic()
        with best_effort():
            self._id = create_progress_artifact(0.0, key=artifact_key(name), description=description)

    def update(self, progress: Progress, *, pause_s: float) -> None:
        if not hasattr(self, "_id") or time.monotonic() - self._updated < pause_s:
            return
        self._updated = time.monotonic()
        numbers = ", ".join([*words_of(progress.numbers), *filter(None, [progress.note])])
        text = f"{self._description}\n\n{progress.state}: {progress.done} of {progress.total} {progress.unit} ({numbers})"
        with best_effort(retries=0):
            update_progress_artifact(self._id, 100.0 * progress.done / max(progress.total, 1), description=text)


@contextlib.contextmanager
def best_effort(*, retries: int = 2) -> Iterator[None]:
    """Calls to the server that may fail; they give up soon, because a child is waiting to be heard meanwhile."""
    patience = {PREFECT_CLIENT_MAX_RETRIES: retries, PREFECT_API_REQUEST_TIMEOUT: REQUEST_S}
    try:
        with temporary_settings(patience):
            yield
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("the Prefect server did not take an artifact: %s", error)


def artifact_key(name: str) -> str:
    """Prefect takes lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def publish_stages(run_name: str, outcomes: Sequence[StageOutcome]) -> None:
    """A table of the stages, and a link to each artifact in the store."""
    with best_effort():
        rows = [{**stage_row(outcome), "artifact": outcome.status.artifact_url} for outcome in outcomes]
        create_table_artifact(rows, key=artifact_key(f"{run_name}-stages"), description="stages")
        for outcome in outcomes:
            url = outcome.status.artifact_url
            link = url if "://" in url else Path(url).resolve().as_uri()
            create_link_artifact(link, link_text=url, key=artifact_key(f"{run_name}-{outcome.status.stage}-folder"))


def stage_row(outcome: StageOutcome) -> dict[str, str]:
    """One stage, ready to be shown."""
    status = outcome.status
    numbers = {
        "shards": status.committed, "missing": len(status.missing), "rows": status.rows, "rejected": status.rejected_rows,
        "tokens": status.tokens,
    }  # fmt: skip
    seconds = outcome.state if outcome.state in ("already done", "in training") else f"{outcome.seconds:.1f}"
    share = status.truncated_share
    counted = {name: f"{number:,}" if number else "" for name, number in numbers.items()}
    told = {**counted, "truncated": "" if share is None else f"{share:.1%}", "MB": f"{status.num_bytes / 1e6:.1f}"}
    return {"stage": status.stage, "state": outcome.state, **told, "seconds": seconds}


def publish_failure(run_name: str, error: Exception) -> None:
    """Why the run failed and how to go on, in the words that the terminal shows too."""
    with best_effort():
        create_markdown_artifact(f"## {run_name} failed\n\n```\n{error}\n```\n", key=artifact_key(f"{run_name}-failure"))


def publish_results(run_name: str, text: str) -> None:
    """The evaluation's report."""
    with best_effort():
        create_markdown_artifact(text, key=artifact_key(f"{run_name}-results"), description="results")


def result_row(part: Mapping[str, Any]) -> dict[str, str]:
    """One benchmark at one temperature, ready to be shown."""
    speeds, (identical, prompts) = part["tokens_per_s"], part["lossless"]
    return {
        "benchmark": part["benchmark"],
        "T": f"{part['temperature']:g}",
        "acceptance length": f"{part['acceptance_length']:.2f}",
        "accepted by position (%)": " ".join(f"{100 * share:.0f}" for share in part["conditional_acceptance"]),
        "tokens/s": f"{speeds['speculative']:.0f}",
        "plain": f"{speeds['plain']:.0f}",
        "speed-up": f"{part['speedup']:.2f}",
        "lossless": "" if part["temperature"] else f"{identical}/{prompts}",  # two draws at temperature 1 need not be the same
    }
