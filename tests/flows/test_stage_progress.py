"""What is shown of a stage at work: rates of this run alone, the lanes, pictures; in artifacts
that are made once.
"""

import json
import time

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from deepspec.artifacts.status import StageStatus
from deepspec.process.progress_display import Progress
from flows.reporting import watched_by
from flows.shard_scheduler import Lane
from flows.stage_artifacts import progress_lines
from flows.stage_progress import StageProgress


def status(stage: str, committed: int, missing: int) -> StageStatus:
    missing_shards = list(range(committed, committed + missing))
    return StageStatus(
        stage=stage,
        artifact_url=f"/store/{stage}/x",
        committed=committed,
        missing=missing_shards,
        rows=10 * committed,
        tokens=0,
        rejected_rows=0,
        num_bytes=0,
        sealed=False,
        failures={},
    )


def shard(number: int, **counts: int) -> dict[str, object]:
    return {
        "event": "shard",
        "stage": "answers",
        "shard": number,
        "rows": 10,
        "tokens": 500,
        "num_bytes": 2_000_000,
        **counts,
    }


def data_of(key: str) -> str:
    found = Artifact.get(key)
    assert found is not None
    return str(found.data)


def test_rates_and_time_left_are_those_of_this_run_and_its_lanes():
    """Of 1,000 shards 900 were there before; the two lanes take 10 s a shard each, so 98 more
    take about 490 s.
    """
    seen, now = list[Progress](), time.monotonic()
    lanes = [Lane(name, doing="answers 0900-0949", began=now - 10) for name in ("a", "b")]
    with watched_by(seen.append):
        progress = StageProgress("rates", status("answers", 900, 100), sharded=True)
        progress._began = now - 10
        progress.show_lanes(lanes)
        progress.on_event(shard(900, rejected=3), lane="a")
        progress.on_event(shard(901), lane="b")
        progress.on_event(shard(901), lane="a")  # reported again after a retry: it counts once
    numbers = seen[-1].numbers
    assert (seen[-1].done, seen[-1].total, numbers["rows"], numbers["rejected"]) == (
        902,
        1000,
        20,
        3,
    )
    assert 0.1 < numbers["rows_per_s"] <= 2 and 5 < numbers["tokens_per_s"] <= 100
    assert 490 <= numbers["left_s"] < 4900
    lines = progress_lines(seen[-1])
    assert lines[0].startswith("running: 902 of 1,000 shards, ") and lines[0].endswith(" left")
    assert "4.0 MB written" in lines and "0 retries, 3 rejected rows, 0 failed shards" in lines


def test_the_lanes_are_a_table_and_the_artifacts_stay_the_same_ones():
    lanes = [Lane("GPU 0 #0", "0", failed=1), Lane("GPU 1 #1", "1", dead=True)]
    progress = StageProgress("lanes", status("hidden", 0, 4), sharded=True)
    progress.show_lanes(lanes)
    lanes[0].doing, lanes[0].began = "hidden 0000-0003", time.monotonic() - 60
    progress.on_event(shard(0), lane="GPU 0 #0")
    progress.set_counts(retries=2, failed=1)
    progress.close("failed")
    first, second = json.loads(data_of("lanes-hidden-lanes"))
    assert (first["lane"], first["device"], first["doing"], first["shards"]) == (
        "GPU 0 #0",
        "0",
        "hidden 0000-0003",
        "1",
    )
    assert (first["failures"], second["dead"]) == ("1", "dead") and 0 < float(
        first["shards/min"]
    ) <= 1.0
    assert data_of("lanes-hidden-throughput").startswith("![hidden](data:image/svg+xml;base64,")
    progress = Artifact.get("lanes-hidden")
    assert progress is not None and progress.data == 25.0
    assert "2 retries, 0 rejected rows, 1 failed shards" in str(progress.description)
    with get_client(sync_client=True) as client:
        for key in ("lanes-hidden", "lanes-hidden-lanes", "lanes-hidden-throughput"):
            assert (
                len(
                    client.read_artifacts(
                        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
                    )
                )
                == 1
            )


def test_shards_that_no_event_named_are_known():
    progress = StageProgress("unreported", status("answers", 0, 4), sharded=True)
    progress.on_event(shard(1))
    assert progress.unreported([0, 1, 2]) == [0, 2]
    assert StageProgress("unreported", status("train", 0, 0), sharded=False).unreported([0]) == []


def test_the_curves_of_a_training_go_on_from_its_last_lines(monkeypatch: pytest.MonkeyPatch):
    drawn = list[list[int]]()
    monkeypatch.setattr(
        "flows.stage_artifacts.training",
        lambda lines: drawn.append([line["step"] for line in lines]) or [],
    )
    lines = [
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 2.5},
        {"step": 20, "held_out_acceptance_length": 1.2},
    ]
    progress = StageProgress("curves", status("train", 0, 0), sharded=False, history=lambda: lines)
    for step in (20, 30, 40):
        progress.on_event(
            {
                "event": "progress",
                "stage": "train",
                "done": step,
                "total": 100,
                "unit": "steps",
                "loss": 2.0,
            }
        )
    progress.close("done")
    assert drawn[-1] == [10, 20, 20, 30, 40]


def test_a_store_that_cannot_be_read_just_then_costs_the_curves_alone(
    caplog: pytest.LogCaptureFixture,
):
    def away() -> list[dict[str, float]]:
        raise ConnectionError("the bucket is away")

    progress = StageProgress("away", status("train", 0, 0), sharded=False, history=away)
    progress.on_event(
        {"event": "progress", "stage": "train", "done": 1, "total": 2, "unit": "steps", "loss": 2.0}
    )
    assert progress.current.done == 1 and "the bucket is away" in caplog.text
    assert data_of("away-train-curves").count("data:image/svg+xml") == 1


def test_progress_counts_every_shard_once_even_if_a_retry_reports_it_again():
    seen: list[Progress] = []
    before = status("answers", 2, 3)
    with watched_by(seen.append):
        progress = StageProgress("flaky", before, sharded=True)
        for shard in (2, 3, 3, 4):
            progress.on_event(
                {
                    "event": "shard",
                    "stage": "answers",
                    "shard": shard,
                    "rows": 2,
                    "tokens": 10,
                    "num_bytes": 100,
                }
            )
            progress.on_event(
                {"event": "progress", "stage": "answers", "done": 1, "total": 2, "unit": "shards"}
            )
        progress.close("done")
    assert [progress.done for progress in seen] == [2, 3, 4, 4, 5, 5]
    assert {"rows": 6, "tokens": 30, "num_bytes": 300, "rejected": 0}.items() <= seen[
        -1
    ].numbers.items()


def test_what_the_lanes_report_of_the_rows_under_way_is_added_up():
    seen: list[Progress] = []
    event = {
        "event": "answering",
        "stage": "answers",
        "rows": 10,
        "rows_todo": 100,
        "tokens": 50,
        "tokens_per_s": 20.0,
        "in_flight": 8,
        "errors": 1,
        "refused": 0,
        "truncated_share": 0.25,
        "left_s": 60,
    }
    with watched_by(seen.append):
        progress = StageProgress("answering", status("answers", 0, 6), sharded=True)
        progress.on_event(event, lane="answers 0-2")
        progress.on_event(
            {**event, "rows": 30}, lane="answers 0-2"
        )  # a later event of the same lane
        progress.on_event({**event, "left_s": 90, "truncated_share": 0.0}, lane="answers 3-5")
        note = seen[-1].note
        progress.close("done")
    assert (
        note == "40 of 200 rows, 40 tokens/s, 16 in flight, 2 errors, 12.5% truncated, 0:01:30 left"
    )
    assert seen[-1].note == ""
