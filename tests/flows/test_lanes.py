"""Lanes: what happens to a lane's group when its thread ends."""

import json
from pathlib import Path

import pytest

from flows.lanes import serve
from flows.local_executor import LocalExecutor
from flows.shard_scheduler import Lane
from tests.flows.test_stage_run import answers_run

pytestmark = pytest.mark.filterwarnings("ignore:Artifact creation outside")


def test_a_lane_that_dies_of_an_unknown_error_keeps_no_other_one_waiting(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """A group that stayed with it for ever would have held every other lane, and the run, in
    `next_group`.
    """
    stage_run = answers_run(run_file)
    scheduler = stage_run.scheduler
    scheduler.lanes = [dying, other] = [Lane("dying"), Lane("other")]
    monkeypatch.setattr(stage_run.progress, "update_lanes", lambda: json.loads("no JSON"))
    with pytest.raises(ValueError, match="Expecting value"):
        serve(stage_run, LocalExecutor(stage_run), dying)
    monkeypatch.undo()
    assert not scheduler._assigned and dying.dead
    left = scheduler.next_group(other)
    scheduler.group_ended(other, left, len(left), 1.0)
    assert left and not scheduler.lane_failed(other)
