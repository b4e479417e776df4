"""The bar of a stage that is run by hand."""

from __future__ import annotations

import pytest

from deepspec.process.events import progress_texts
from deepspec.process.terminal import TerminalReport


def test_a_training_shows_loss_acceptance_speed_and_the_time_left_that_it_reckons(
    monkeypatch, capsys: pytest.CaptureFixture[str]
):
    """It goes on at step 900: the bar itself would take all 910 steps for the work of a moment."""
    monkeypatch.setenv("COLUMNS", "200")
    report = TerminalReport()
    event = {
        "event": "progress",
        "stage": "train",
        "total": 1000,
        "unit": "steps",
        "loss": 2.3457,
        "acceptance_length": 1.83,
    }
    report.show({**event, "done": 910, "tokens": 5000, "tokens_per_s": 1234.5, "left_s": 95})
    report.progress.stop()  # where there is no terminal, it is shown at its end
    shown = capsys.readouterr().err
    for words in ("910/1000", "0:01:35", "loss 2.3457", "acceptance_length 1.83", "1,234 tokens/s"):
        assert words in shown


def test_numbers_without_words_of_their_own_are_named():
    assert progress_texts({"rows": 5, "tokens_per_s": 12345.6, "left_s": 61}) == [
        "rows 5",
        "12,346 tokens/s",
        "0:01:01 left",
    ]
