"""What is known of a stage at work: its children's words added up, and shown to whoever watches
and in the Prefect UI.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.filesize import decimal

from deepspec.artifacts.status import StageStatus
from deepspec.errors import DeepSpecError
from deepspec.figures.curves import Made, throughput, training
from deepspec.figures.picture import data_url
from deepspec.process.events import answering_note, progress_texts
from deepspec.process.progress_display import Progress, State
from flows.live import Content, LiveArtifact, table_content
from flows.reporting import report_progress
from flows.shard_scheduler import Lane

log = logging.getLogger(__name__)

PROGRESS_S, LANES_S, PICTURES_S = 5.0, 10.0, 60.0  # between two updates of an artifact
ENVELOPE = ("event", "stage", "done", "total", "unit")
RETRIED = ("retries", "failed")  # what the run itself counts
UNCOUNTED = ("left_s", "rejected", *RETRIED)  # told in a line of their own
SUMMED = ("rows", "tokens", "num_bytes", "rejected")

History = Callable[[], Sequence[Mapping[str, Any]]]


class StageProgress:
    """Adds up what the children of one stage say, and shows it.

    Args:
        run_name: Artifacts are named by it and the stage.
        before: The stage as it was when the run began.
        sharded: Whether shards are counted, each once; else the newest `progress` event of the only
            child counts.
        history: The lines of a training's metrics.jsonl, those of earlier runs included.
    """

    def __init__(
        self, run_name: str, before: StageStatus, *, sharded: bool, history: History = tuple
    ) -> None:
        self._lock, self._began = threading.Lock(), time.monotonic()
        self._under_way: dict[str, Mapping[str, Any]] = {}
        self._sharded, self._committed, self._url, self._history = (
            sharded,
            before.committed,
            before.artifact_url,
            history,
        )
        self._seen, self._made, self._steps, self._by_lane = (
            set[int](),
            list[Made](),
            list[dict[str, Any]](),
            Counter[str](),
        )
        self._lanes: Sequence[Lane] = ()
        total = before.committed + len(before.missing) if sharded else 0
        self.current = Progress(
            before.stage,
            "running",
            before.committed if sharded else 0,
            total,
            "shards" if sharded else "",
            {},
        )
        name = f"{run_name}-{before.stage}"
        self._artifact = LiveArtifact("progress", name, pause_s=PROGRESS_S)
        self._lane_table = LiveArtifact("table", f"{name}-lanes", pause_s=LANES_S)
        self._pictures = LiveArtifact(
            "markdown", f"{name}-{'throughput' if sharded else 'curves'}", pause_s=PICTURES_S
        )
        self._show()

    def show_lanes(self, lanes: Sequence[Lane]) -> None:
        """Show what these lanes do, too."""
        with self._lock:
            self._lanes = lanes
            self._show()

    def on_event(self, event: Mapping[str, Any], *, lane: str = "") -> None:
        """Take in one event of a lane's child; may be called from several threads."""
        with self._lock:
            if event["event"] == "shard" and self._sharded:
                self._add_shard(event, lane)
            elif event["event"] == "answering":
                self._under_way[lane] = event
                self.current = self.current._replace(
                    note=answering_note(list(self._under_way.values()))
                )
            elif event["event"] == "progress" and not self._sharded:
                self._add_progress(event)
            else:
                return
            self._show()

    def unreported(self, shards: Collection[int]) -> list[int]:
        """Those of the shards that no child has told of: it was killed just then, or worked
        where it is not heard.
        """
        with self._lock:
            return sorted(set(shards) - self._seen) if self._sharded else []

    def set_counts(self, *, retries: int, failed: int) -> None:
        """How many shards were given out again so far, and how many failed so that this run
        does not try them again.
        """
        with self._lock:
            self.current = self.current._replace(
                numbers={**self.current.numbers, "retries": retries, "failed": failed}
            )
            self._show()

    def set_note(self, note: str) -> None:
        """Show a sentence beside the numbers, until another one takes its place."""
        with self._lock:
            self.current = self.current._replace(note=note)
            self._show()

    def update_lanes(self) -> None:
        """A lane began or ended a group."""
        with self._lock:
            self._publish_lanes()

    def close(self, state: State) -> None:
        with self._lock:
            total = max(self.current.total, self.current.done, 1)
            done = self.current.done if state == "failed" else total
            numbers = {
                name: value for name, value in self.current.numbers.items() if name != "left_s"
            }
            self.current = self.current._replace(
                state=state, done=done, total=total, note="", numbers=numbers
            )
            self._show(now=True)

    def end_waiting(self) -> None:
        """Nothing is waited for any more; what is left to do is shown by a progress of its own."""
        with self._lock:
            self.current = self.current._replace(state="waited", note="")
            self._artifact.publish(self._described, now=True)

    def _add_shard(self, event: Mapping[str, Any], lane: str) -> None:
        """Children count their own shards from zero, and again after a retry; here every shard
        counts once.
        """
        if event["shard"] in self._seen:
            return
        self._seen.add(event["shard"])
        self._by_lane[lane] += 1
        seconds, numbers = max(time.monotonic() - self._began, 1e-3), dict(self.current.numbers)
        self._made.append(Made(seconds, event.get("tokens", 0)))
        numbers |= {name: numbers.get(name, 0) + event.get(name, 0) for name in SUMMED}
        numbers |= {f"{name}_per_s": numbers[name] / seconds for name in ("rows", "tokens")}
        done = self._committed + len(self._seen)
        self.current = self.current._replace(
            done=done, numbers=numbers | {"left_s": self._left_s(self.current.total - done)}
        )

    def _add_progress(self, event: Mapping[str, Any]) -> None:
        kept = {name: value for name, value in self.current.numbers.items() if name in RETRIED}
        numbers = {key: value for key, value in event.items() if key not in ENVELOPE}
        # total: null while unknown
        counted = {
            "done": event["done"],
            "total": event["total"] or 0,
            "unit": event.get("unit", ""),
        }
        self.current = self.current._replace(**counted, numbers={**numbers, **kept})
        if "loss" in numbers:
            self._steps.append({"step": event["done"], **numbers})

    def _left_s(self, shards: int) -> int:
        """Seconds for so many shards at the speed of all lanes; one that has not shown its own
        is as fast as the others.
        """
        now, alive = time.monotonic(), [lane for lane in self._lanes if not lane.dead]
        known = [
            self._by_lane[lane.name] / busy
            for lane in alive
            if self._by_lane[lane.name] and (busy := lane.busy_until(now)) > 0
        ]
        speed = (
            sum(known) / len(known) * len(alive)
            if known
            else len(self._seen) / max(now - self._began, 1e-3)
        )
        return round(shards / speed)

    def _show(self, *, now: bool = False) -> None:
        report_progress(self.current)
        self._artifact.publish(self._described, now=now)
        self._publish_lanes(now=now)
        self._pictures.publish(self._drawn, now=now)

    def _publish_lanes(self, *, now: bool = False) -> None:
        if self._sharded and self._lanes:
            self._lane_table.publish(self._lane_rows, now=now)

    def _described(self) -> Content:
        progress = self.current
        lines = "\n".join(f"* {line}" for line in progress_lines(progress))
        return Content(
            100.0 * progress.done / max(progress.total, 1),
            f"{progress.stage}: {self._url}\n\n{lines}",
        )

    def _lane_rows(self) -> Content:
        now = time.monotonic()
        rows = [
            lane_row(lane, max(lane.shards, self._by_lane[lane.name]), now, now - self._began)
            for lane in self._lanes
        ]
        return table_content(rows, f"{self.current.stage}: lanes")

    def _lines(self) -> list[Mapping[str, Any]]:
        try:
            return list(self._history())
        except (OSError, DeepSpecError) as error:
            log.warning("the curves of %s begin with this run: %s", self.current.stage, error)
            return []

    def _drawn(self) -> Content | None:
        """The throughput once there is something to see; of a training, the lines so far and
        what was said since.
        """
        if self._sharded:
            pictures = (
                [throughput(self.current.stage, self._made, time.monotonic() - self._began)]
                if self._made
                else []
            )
        else:
            lines = self._lines() if self._steps else []
            last = max((line["step"] for line in lines if "loss" in line), default=-1)
            pictures = training([*lines, *(step for step in self._steps if step["step"] > last)])
        if not pictures:
            return None
        shown = "\n\n".join(f"![{self.current.stage}]({data_url(picture)})" for picture in pictures)
        return Content(
            shown,
            f"{self.current.stage}: {'throughput' if self._sharded else 'loss and acceptance'}",
        )


def progress_lines(progress: Progress) -> list[str]:
    """How far a stage is, in lines."""
    how_far = f"{progress.state}: {progress.done:,} of {progress.total:,} {progress.unit}".rstrip()
    numbers, lines = progress.numbers, [how_far if progress.total else progress.state]
    if numbers.get("left_s"):
        lines[0] += f", {timedelta(seconds=numbers['left_s'])} left"
    if "rows_per_s" not in numbers:
        lines.append(
            ", ".join(
                progress_texts(
                    {name: value for name, value in numbers.items() if name not in UNCOUNTED}
                )
            )
        )
    else:
        lines.append(f"{numbers['rows']:,} rows, {numbers['rows_per_s']:,.1f} rows/s")
        lines.append(f"{numbers['tokens']:,} tokens, {numbers['tokens_per_s']:,.0f} tokens/s")
        lines.append(f"{decimal(int(numbers['num_bytes']))} written")
    trouble = {"retries": "retries", "rejected": "rejected rows", "failed": "failed shards"}
    lines.append(", ".join(f"{numbers.get(name, 0):,} {words}" for name, words in trouble.items()))
    return [line for line in (*lines, progress.note) if line]


def lane_row(lane: Lane, shards: int, now: float, seconds: float) -> dict[str, str]:
    """One lane, ready to be shown, so many seconds after the stage began."""
    busy_s = lane.busy_until(now)
    return {
        "lane": lane.name,
        "device": lane.device or "",
        "doing": lane.doing,
        "shards": f"{shards:,}",
        "shards/min": f"{60 * shards / busy_s:.1f}" if busy_s else "",
        "busy": f"{min(busy_s / max(seconds, 1e-3), 1.0):.0%}",
        "failures": f"{lane.failed:,}",
        "dead": "dead" if lane.dead else "",
    }
