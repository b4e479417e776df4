"""What a run reports while it works and at its end: progress to its watcher, artifacts to the
Prefect UI.

Artifacts are a help, not a condition: where the server does not accept one, the log has a line
about it and the run goes on.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from deepspec.artifacts.results import BenchmarkMetrics
from deepspec.artifacts.status import StageStatus
from deepspec.process.progress_display import Progress, State

log = logging.getLogger(__name__)

REQUEST_S = 5.0


class StageOutcome(NamedTuple):
    """What became of a stage in this run."""

    status: StageStatus
    state: State
    seconds: float


Watcher = Callable[[Progress], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Runs that are started in this block report their progress to `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def report_progress(progress: Progress) -> None:
    """Passes the progress to the watcher, if there is one."""
    if watcher := _watcher.get():
        watcher(progress)


def report_nothing_to_do(status: StageStatus, state: State) -> None:
    """Reports a stage in which this run does nothing."""
    report_progress(Progress(status.stage, state, 1, 1, "", {}))


@contextlib.contextmanager
def best_effort(*, retries: int = 2) -> Iterator[None]:
    """Calls to the server that may fail; they give up soon, because a child's output waits to be
    read meanwhile.
    """
    patience = {PREFECT_CLIENT_MAX_RETRIES: retries, PREFECT_API_REQUEST_TIMEOUT: REQUEST_S}
    try:
        with temporary_settings(patience):
            yield
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("the Prefect server did not take an artifact: %s", error)


def prefect_key(name: str) -> str:
    """The name as an artifact's key: Prefect allows lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def publish_stages(run_name: str, outcomes: Sequence[StageOutcome]) -> None:
    """A table of the stages, and a link to each artifact in the store."""
    with best_effort():
        rows = [
            {**stage_row(outcome), "artifact": outcome.status.artifact_url} for outcome in outcomes
        ]
        create_table_artifact(rows, key=prefect_key(f"{run_name}-stages"), description="stages")
        for outcome in outcomes:
            url = outcome.status.artifact_url
            key = prefect_key(f"{run_name}-{outcome.status.stage}-folder")
            create_link_artifact(_link(url), link_text=url, key=key)


def _link(url: str) -> str:
    return url if "://" in url else Path(url).resolve().as_uri()


def stage_row(outcome: StageOutcome) -> dict[str, str]:
    """One stage, formatted for a table."""
    status = outcome.status
    counts = {
        "shards": status.committed,
        "missing": len(status.missing),
        "rows": status.rows,
        "rejected": status.rejected_rows,
        "tokens": status.tokens,
    }
    is_timed = outcome.state not in ("already done", "in training")
    share = status.truncated_share
    return {
        "stage": status.stage,
        "state": outcome.state,
        **{name: f"{number:,}" if number else "" for name, number in counts.items()},
        "truncated": "" if share is None else f"{share:.1%}",
        "MB": f"{status.num_bytes / 1e6:.1f}",
        "seconds": f"{outcome.seconds:.1f}" if is_timed else outcome.state,
    }


def publish_results(
    run_name: str, text: str, benchmarks: Sequence[BenchmarkMetrics], report_url: str, command: str
) -> None:
    """The evaluation's report as text, its numbers as a table, and where the whole report is."""
    whole_report = [
        f"[The report with figures]({_link(report_url)})",
        f"It is at `{report_url}`.",
        "A browser may refuse to go there from this page; then open it yourself, or make a copy:",
        f"```\n{command}\n```",
    ]
    rows = [result_row(part) for part in benchmarks]
    with best_effort():
        create_markdown_artifact(
            text, key=prefect_key(f"{run_name}-results"), description="results"
        )
        create_table_artifact(
            rows, key=prefect_key(f"{run_name}-benchmarks"), description="benchmarks"
        )
        create_markdown_artifact(
            "\n\n".join(whole_report),
            key=prefect_key(f"{run_name}-report"),
            description="the report with figures",
        )


def result_row(part: BenchmarkMetrics) -> dict[str, str]:
    """One benchmark at one temperature, formatted for a table."""
    identical, prompts = part.lossless
    return {
        "benchmark": part.benchmark,
        "T": f"{part.temperature:g}",
        "acceptance length": f"{part.acceptance_length:.2f}",
        "accepted by position (%)": " ".join(
            f"{100 * share:.0f}" for share in part.conditional_acceptance
        ),
        "tokens/s": f"{part.tokens_per_s.speculative:.0f}",
        "plain": f"{part.tokens_per_s.plain:.0f}",
        "speed-up": f"{part.speedup:.2f}",
        # two draws at temperature 1 need not be the same
        "lossless": "" if part.temperature else f"{identical}/{prompts}",
    }
