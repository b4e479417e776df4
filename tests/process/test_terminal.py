"""What a stage that is run by hand shows of its events."""

import json

import pytest

from deepspec.process.events import progress_texts
from deepspec.process.terminal import TerminalReport

STEPS = {"event": "progress", "stage": "train", "total": 1000, "unit": "steps"}


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
