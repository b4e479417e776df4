"""Bars on a terminal, few lines elsewhere, and the numbers that a stage gave."""

import re

import pytest

from deepspec.process.progress_display import Progress, ProgressDisplay

RESUMED = {
    "loss": 2.345678,
    "acceptance_length": 1.83,
    "tokens": 5000,
    "tokens_per_s": 1234.5,
    "left_s": 95,
}


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
