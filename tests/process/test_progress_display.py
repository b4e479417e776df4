"""Bars on a terminal, few lines elsewhere, and the numbers that a stage gave."""

import json
import re

import pytest

from deepspec.process.events import progress_texts
from deepspec.process.progress_display import Progress, ProgressDisplay, TerminalReport

RESUMED = {
    "loss": 2.345678,
    "acceptance_length": 1.83,
    "tokens": 5000,
    "tokens_per_s": 1234.5,
    "left_s": 95,
}
STEPS = {"event": "progress", "stage": "train", "total": 1000, "unit": "steps"}


def training(done: int, numbers: dict[str, float], state: str = "running") -> Progress:
    return Progress("train", state, done, 1000, "steps", numbers)


def test_without_a_terminal_a_stage_writes_few_lines_but_one_for_every_change_of_state(
    capsys: pytest.CaptureFixture[str],
):
    with ProgressDisplay(["train"]) as display:
        for done in range(100):
            display.show(training(done, {"loss": 2.345678, "tokens": 10 * done}))
        display.show(training(1000, {"loss": 1.5, "tokens": 1000}, "done"))
    shown = capsys.readouterr()
    assert shown.out == "", "stdout is kept for the results"
    lines = shown.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train: running 0 of 1000 steps, loss 2.3457")
    assert lines[1].startswith("train: done 1000 of 1000 steps") and "tokens/s" in lines[1]


def test_a_training_shows_its_own_speed_and_the_time_left(capsys: pytest.CaptureFixture[str]):
    """Of one resumed at step 900, what was done before would make both far too good."""
    with ProgressDisplay() as display:
        display.show(training(910, RESUMED))
        display.show(training(1000, {**RESUMED, "left_s": 0}, "done"))
    running, done = capsys.readouterr().err.splitlines()
    numbers = "loss 2.3457, acceptance_length 1.83, tokens 5000, 1,234 tokens/s"
    assert running == f"train: running 910 of 1000 steps, {numbers}, 0:01:35 left"
    assert done == f"train: done 1000 of 1000 steps, {numbers}"


@pytest.mark.parametrize("stages", [["train"], []], ids=["known before", "met on the way"])
def test_the_bar_of_a_training_shows_the_time_left_that_it_was_given(
    stages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take it for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with ProgressDisplay(stages) as display:
        display.show(training(910, RESUMED))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    for text in (
        "910/1000",
        "left 0:01:35",
        "loss 2.3457",
        "acceptance_length 1.83",
        "1,234 tokens/s",
    ):
        assert text in shown


def test_of_what_went_wrong_a_stage_shows_what_is_not_zero_also_beside_a_note(
    capsys: pytest.CaptureFixture[str],
):
    numbers = {"retries": 0, "rejected": 3, "failed": 1200, "num_bytes": 10**9}
    with ProgressDisplay() as display:
        display.show(Progress("answers", "running", 2, 6, "shards", numbers, note="waiting"))
    line = capsys.readouterr().err.strip()
    assert line == "answers: running 2 of 6 shards, waiting, 3 rejected, 1,200 failed"


def test_a_training_shows_loss_acceptance_speed_and_the_time_left_that_it_computes(
    capsys: pytest.CaptureFixture[str],
):
    """It goes on at step 900: a bar itself would take all 910 steps for the work of a moment."""
    numbers = {"loss": 2.3457, "acceptance_length": 1.83, "tokens": 5000, "tokens_per_s": 1234.5}
    TerminalReport().show({**STEPS, "done": 910, **numbers, "left_s": 95})
    shown = capsys.readouterr().err
    for text in (
        "910 of 1000",
        "0:01:35",
        "loss 2.3457",
        "acceptance_length 1.83",
        "1,234 tokens/s",
    ):
        assert text in shown


def test_rows_under_way_are_shown_until_the_stage_has_ended(capsys: pytest.CaptureFixture[str]):
    report = TerminalReport()
    answering = {"rows": 10, "rows_todo": 100, "tokens_per_s": 20.0, "in_flight": 8}
    answering |= {"errors": 0, "refused": 0, "truncated_share": 0.0, "left_s": None}
    report.show({"event": "answering", "stage": "answers", **answering})
    shards = {"event": "progress", "stage": "answers", "total": 6, "unit": "shards"}
    report.show({**shards, "done": 5, "rows": 60})
    assert report.progress.done == 5 and report.progress.note.startswith("10 of 100 rows")
    report.show({**shards, "done": 6, "rows": 72})
    first, last = capsys.readouterr().err.splitlines()
    assert first == "answers: running, 10 of 100 rows, 20 tokens/s, 8 in flight"
    assert last.startswith("answers: done 6 of 6 shards, rows 72")


def test_the_results_are_one_json_object_on_stdout(capsys: pytest.CaptureFixture[str]):
    result = {"acceptance_length": {"macro": 3.0}, "lossless": [2, 2], "speedup": 1.5}
    TerminalReport().show({"event": "result", "stage": "evaluate", **result, "seconds": 5})
    TerminalReport().show({"event": "paused", "stage": "evaluate", "why": "the disk is full"})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == result and shown.err == ""


def test_numbers_without_a_text_of_their_own_are_named():
    assert progress_texts({"rows": 5, "tokens_per_s": 12345.6, "left_s": 61}) == [
        "rows 5",
        "12,346 tokens/s",
        "0:01:01 left",
    ]
