"""A child may log as much as it likes: the run's log has a bounded part of it, and names where
the rest is.
"""

from contextlib import closing
from pathlib import Path

import pytest
from prefect import flow

from flows.child_log import OTHERS_AT_ONCE, WARNINGS_AT_ONCE, Allowance, ChildLog


@flow
def chatty(path: Path) -> None:
    with closing(ChildLog(path)) as forward:
        for number in range(500):
            forward(f"2026-01-01 INFO deepspec.artifacts.shard_loop: shard={number}")
            forward(f"2026-01-01 ERROR deepspec.artifacts.shard_loop: trouble {number}")
        forward("x" * 100_000)


def test_a_chatty_childs_lines_are_bounded_and_the_others_counted(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    chatty(tmp_path / "answers-0000.log")
    shown = [
        record
        for record in caplog.records
        if record.name == "prefect.flow_runs"
        and " deepspec.artifacts.shard_loop: " in record.getMessage()
    ]
    levels = [record.levelname for record in shown]
    # A slow machine may take seconds for the thousand lines, in which one or the other comes back.
    assert (
        WARNINGS_AT_ONCE <= levels.count("ERROR") <= WARNINGS_AT_ONCE + 20
        and OTHERS_AT_ONCE <= levels.count("INFO") <= OTHERS_AT_ONCE + 5
    )
    (rest,) = [
        record.getMessage()
        for record in caplog.records
        if "lines were left out here" in record.getMessage()
    ]
    assert rest == (
        f"{1001 - len(shown)} lines were left out here; "
        f"{tmp_path / 'answers-0000.log'} has them all"
    )


@flow
def quiet(path: Path) -> None:
    with closing(ChildLog(path)) as forward:
        forward("y" * 100_000)
        forward("a line of another program")


def test_a_quiet_childs_lines_are_all_there_and_long_ones_cut(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    quiet(tmp_path / "x.log")
    shown = [record.getMessage() for record in caplog.records]
    assert "y" * 2000 in shown and "a line of another program" in shown
    assert not any("left out" in line for line in shown)


def test_what_was_used_comes_back_with_time(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("flows.child_log.time.monotonic", lambda: now[0])
    allowance = Allowance(2, 10.0)
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    now[0] += 10
    assert [allowance.take() for _ in range(2)] == [True, False]
    now[0] += 1000
    assert [allowance.take() for _ in range(3)] == [True, True, False], "never more than at once"
