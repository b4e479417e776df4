"""How far a stage at work is: the events of its children, added up, and shown to the watcher and in
the Prefect UI.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from deepspec.artifacts.records import Record
from deepspec.artifacts.status import StageStatus
from deepspec.errors import DeepSpecError
from deepspec.figures.curves import Made
from deepspec.process.events import answering_note
from deepspec.process.progress_display import ENVELOPE, Progress, State
from flows.live import Content, LiveArtifact
from flows.reporting import report_progress
from flows.shard_scheduler import Lane
from flows.stage_artifacts import (
    lane_table,
    progress_content,
    throughput_picture,
    training_pictures,
)

log = logging.getLogger(__name__)

PROGRESS_S, LANES_S, PICTURES_S = 5.0, 10.0, 60.0  # between two updates of an artifact
RETRIED = ("retries", "failed")  # counted by the run itself, not by its children
SUMMED = ("rows", "tokens", "num_bytes", "rejected")

History = Callable[[], Sequence[Mapping[str, Any]]]


class StageProgress:
    """The sum of what the children of one stage report; its methods may be called from several
    threads.

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
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._before, self._sharded, self._history = before, sharded, history
        self._answering: dict[str, Mapping[str, Any]] = {}  # newest event of each lane
        self._seen = set[int]()
        self._made = list[Made]()
        self._made_by_lane = Counter[str]()
        self._steps = list[dict[str, Any]]()
        self._lanes: Sequence[Lane] = ()
        self.current = Progress(before.stage, "running", 0, 0, "", {})
        if sharded:
            total = before.committed + len(before.missing)
            self.current = self.current._replace(done=before.committed, total=total, unit="shards")
        name = f"{run_name}-{before.stage}"
        pictures = f"{name}-{'throughput' if sharded else 'curves'}"
        self._artifact = LiveArtifact("progress", name, pause_s=PROGRESS_S)
        self._lane_table = LiveArtifact("table", f"{name}-lanes", pause_s=LANES_S)
        self._pictures = LiveArtifact("markdown", pictures, pause_s=PICTURES_S)
        self._show()

    def show_lanes(self, lanes: Sequence[Lane]) -> None:
        """From now on these lanes are shown; more may be appended."""
        with self._lock:
            self._lanes = lanes
            self._show()

    def on_event(self, event: Mapping[str, Any], *, lane: str = "") -> None:
        """Add one event of a lane's child."""
        with self._lock:
            if event["event"] == "shard" and self._sharded:
                self._add_shard(event, lane)
            elif event["event"] == "answering":
                self._answering[lane] = event
                note = answering_note(list(self._answering.values()))
                self.current = self.current._replace(note=note)
            elif event["event"] == "progress" and not self._sharded:
                self._add_progress(event)
            else:
                return
            self._show()

    def add_record(self, record: Record, *, lane: str = "") -> None:
        """Add a committed shard of which no event arrived."""
        fields = record.model_dump(include={"shard", *SUMMED})
        self.on_event({"event": "shard", "stage": self.current.stage, **fields}, lane=lane)

    def unreported(self, shards: Collection[int]) -> list[int]:
        """Those of the shards that no event named: their child was killed just then, or works where
        its events do not reach this process.
        """
        with self._lock:
            return sorted(set(shards) - self._seen) if self._sharded else []

    def set_counts(self, *, retries: int, failed: int) -> None:
        """How many shards were assigned again so far, and how many failed so that this run does not
        try them again.
        """
        with self._lock:
            numbers = {**self.current.numbers, "retries": retries, "failed": failed}
            self.current = self.current._replace(numbers=numbers)
            self._show()

    def set_note(self, note: str) -> None:
        """Show a sentence with the numbers, until another one takes its place."""
        with self._lock:
            self.current = self.current._replace(note=note)
            self._show()

    def update_lanes(self) -> None:
        """A lane began or ended a group."""
        with self._lock:
            self._publish_lanes()

    def close(self, state: State) -> None:
        """The stage has ended like this; it is shown a last time."""
        with self._lock:
            total = max(self.current.total, self.current.done, 1)
            numbers = dict(self.current.numbers)
            numbers.pop("left_s", None)
            self.current = self.current._replace(
                state=state,
                done=self.current.done if state == "failed" else total,
                total=total,
                note="",
                numbers=numbers,
            )
            self._show(now=True)

    def end_waiting(self) -> None:
        """The run waits no longer for another one; what is left to do has a progress of its own."""
        with self._lock:
            self.current = self.current._replace(state="waited", note="")
            self._artifact.publish(self._progress_content, now=True)

    def _add_shard(self, event: Mapping[str, Any], lane: str) -> None:
        """Children count their own shards from zero, and again after a retry; here every shard
        counts once.
        """
        if event["shard"] in self._seen:
            return
        self._seen.add(event["shard"])
        self._made_by_lane[lane] += 1
        seconds = max(time.monotonic() - self._began, 1e-3)
        self._made.append(Made(seconds, event.get("tokens", 0)))
        numbers = dict(self.current.numbers)
        numbers |= {name: numbers.get(name, 0) + event.get(name, 0) for name in SUMMED}
        numbers |= {f"{name}_per_s": numbers[name] / seconds for name in ("rows", "tokens")}
        done = self._before.committed + len(self._seen)
        numbers["left_s"] = self._left_s(self.current.total - done)
        self.current = self.current._replace(done=done, numbers=numbers)

    def _add_progress(self, event: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in event.items() if name not in ENVELOPE}
        kept = {name: value for name, value in self.current.numbers.items() if name in RETRIED}
        self.current = self.current._replace(
            done=event["done"],
            total=event["total"] or 0,  # null while it is unknown
            unit=event.get("unit", ""),
            numbers={**numbers, **kept},
        )
        if "loss" in numbers:
            self._steps.append({"step": event["done"], **numbers})

    def _left_s(self, num_shards: int) -> int:
        """Seconds for so many shards at the speed of all lanes; a lane without a measured speed
        counts as fast as the others.
        """
        now = time.monotonic()
        alive = [lane for lane in self._lanes if not lane.dead]
        known = [
            self._made_by_lane[lane.name] / lane.busy_until(now)
            for lane in alive
            if self._made_by_lane[lane.name] and lane.busy_until(now) > 0
        ]
        if known:
            shards_per_s = sum(known) / len(known) * len(alive)
        else:
            shards_per_s = len(self._seen) / max(now - self._began, 1e-3)
        return round(num_shards / shards_per_s)

    def _show(self, *, now: bool = False) -> None:
        report_progress(self.current)
        self._artifact.publish(self._progress_content, now=now)
        self._publish_lanes(now=now)
        self._pictures.publish(self._pictures_content, now=now)

    def _publish_lanes(self, *, now: bool = False) -> None:
        if self._sharded and self._lanes:
            self._lane_table.publish(self._lanes_content, now=now)

    def _progress_content(self) -> Content:
        return progress_content(self.current, self._before.artifact_url)

    def _lanes_content(self) -> Content:
        return lane_table(self.current.stage, self._lanes, self._made_by_lane, self._began)

    def _pictures_content(self) -> Content | None:
        if self._sharded:
            seconds = time.monotonic() - self._began
            return throughput_picture(self.current.stage, self._made, seconds)
        return training_pictures(self._logged_lines(), self._steps) if self._steps else None

    def _logged_lines(self) -> list[Mapping[str, Any]]:
        try:
            return list(self._history())
        except (OSError, DeepSpecError) as error:
            log.warning("the curves of %s begin with this run: %s", self.current.stage, error)
            return []
