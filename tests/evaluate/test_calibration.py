"""Calibration: rounds whose labels are known, temperatures that were hidden in made rounds, and
measures of probabilities against labels, by hand.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepspec.evaluate.calibration import (
    auroc,
    expected_calibration_error,
    fit_calibration,
    fit_temperatures,
    measures,
    reliability,
)
from deepspec.evaluate.rounds import calibrated, cut_below, read_rounds, split_by_prompt
from deepspec.export.export import export_draft, read_temperatures
from deepspec.model.checkpoint import save_draft
from deepspec.storage.store import pretty_json
from tests.evaluate.made_rounds import made_rows
from tests.model.drafts import make_draft


def row(**columns: Any) -> dict[str, Any]:
    return {"benchmark": "made", "temperature": 1.0, "batch_size": 1, "prompt": 0, **columns}


@pytest.mark.parametrize(
    ("proposed", "accepted", "committed", "kept"),
    [
        (3, 1, 2, True),  # rejected at the second
        (3, 3, 4, True),  # all accepted, and the bonus
        # ended by an accepted stop token: what the target thought of the third is unknown
        (3, 2, 2, False),
        (3, 3, 3, True),  # the stop token was the last one: every label is known
        (2, 1, 2, False),  # cut before verification
    ],
)
def test_only_rounds_whose_every_label_is_known_are_read(
    proposed: int, accepted: int, committed: int, kept: bool
):
    told = [[0.5, 0.6, 0.7]]
    rounds = read_rounds(
        [row(proposed=[proposed], accepted=[accepted], committed=[committed], confidence=told)], 3
    )
    assert len(rounds.accepted) == kept
    assert rounds.confidence.tolist() == (told if kept else [])


def test_a_draft_without_confidence_leaves_no_rounds_and_no_summary(
    caplog: pytest.LogCaptureFixture,
):
    rows = [
        row(proposed=[3] * 200, accepted=[1] * 200, committed=[2] * 200, confidence=told)
        for told in (None, [])
    ]
    assert read_rounds(rows, 3).confidence.shape == (0, 3)
    with caplog.at_level("INFO"):
        assert fit_calibration(rows, 3) is None
    assert "no confidence" in caplog.text


def test_a_prompt_is_never_on_both_sides_of_the_split():
    """Not even where it was decoded at several temperatures and batch sizes."""
    rows = [
        {**each, "temperature": temperature}
        for temperature in (0.0, 1.0)
        for each in made_rows(7, 4, temperatures=(1.0, 1.0))
    ]
    rounds = read_rounds(rows, 2)
    first, second = split_by_prompt(rounds)
    assert set(first.prompt) | set(second.prompt) == set(range(7))
    assert not set(first.prompt) & set(second.prompt)
    assert (first.num_prompts, second.num_prompts) == (3, 4)
    assert np.array_equal(split_by_prompt(rounds)[0].prompt, first.prompt)


def test_a_temperature_divides_the_logit():
    confidence, temperatures = np.array([[0.2, 0.5, 0.999], [0.0, 1.0, 0.7]]), (0.5, 3.0, 2.0)
    with np.errstate(divide="ignore"):
        wanted = 1 / (1 + np.exp(-np.log(confidence / (1 - confidence)) / temperatures))
    assert calibrated(confidence, temperatures) == pytest.approx(wanted)
    assert calibrated(confidence, None) is confidence


def test_each_temperature_is_the_best_for_the_product_given_the_ones_before():
    rounds = read_rounds(made_rows(20, 30, temperatures=(2.0, 0.5)), 2)
    grid = np.exp(np.linspace(-np.log(5), np.log(5), 161)).round(6)
    first, second = fit_temperatures(rounds)

    def error(*temperatures: float) -> float:
        chance = np.prod(
            calibrated(rounds.confidence[:, : len(temperatures)], temperatures), axis=1
        )
        return expected_calibration_error(chance, rounds.accepted >= len(temperatures))

    assert error(first) == pytest.approx(min(error(each) for each in grid))
    assert error(first, second) == pytest.approx(min(error(first, each) for each in grid))


def test_only_the_first_temperature_and_batch_size_are_calibrated():
    rows = made_rows(10, 60, temperatures=(1.0, 1.0))
    assert fit_calibration(rows, 2) is not None
    more = [
        {**each, "batch_size": size, "temperature": t}
        for t, size in ((0.0, 1), (1.0, 8))
        for each in rows
    ]
    assert fit_calibration([*rows, *more], 2) == fit_calibration(rows, 2)


def test_a_slot_that_few_rounds_reached_keeps_its_confidence():
    rows = made_rows(4, 150, temperatures=(3.0, 3.0, 3.0, 3.0))
    fitted, _ = split_by_prompt(read_rounds(rows, 4))
    reached = [int((fitted.accepted >= slot).sum()) for slot in range(4)]
    assert reached[1] >= 200 > reached[3]
    first, second, _, last = fit_temperatures(fitted)
    assert min(first, second) > 1.0
    assert last == 1.0


def test_too_few_rounds_or_one_prompt_alone_are_not_calibrated(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        assert fit_calibration(made_rows(2, 199, temperatures=(1.0,)), 1) is None
        assert fit_calibration(made_rows(1, 500, temperatures=(1.0,)), 1) is None
    assert fit_calibration(made_rows(2, 200, temperatures=(1.0,)), 1) is not None
    assert caplog.text.count("too few whole rounds") == 2
    assert fit_calibration([], 1) is None


def test_a_calibration_is_written_read_and_goes_out_with_the_export(tmp_path: Path):
    found = fit_calibration(made_rows(20, 120, temperatures=(2.0, 1.0, 0.5, 1.0)), 4)
    assert found is not None
    save_draft(make_draft(lowest=0), tmp_path / "draft")
    path = tmp_path / "draft" / "calibration.json"
    path.write_bytes(pretty_json(found.model_dump()))
    assert read_temperatures(path, 4).tolist() == pytest.approx(found.temperatures)
    told = json.loads(path.read_text())
    assert (told["rounds"], told["prompts"], told["benchmarks"], told["grid"]["steps"]) == (
        1200,
        10,
        ["made"],
        161,
    )
    export_draft(tmp_path / "draft", engine="sglang", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == told


def test_a_block_is_cut_at_the_first_low_confidence_whatever_comes_behind():
    confidence = np.array([[0.9, 0.4, 0.9], [0.5, 0.5, 0.5], [0.1, 0.9, 0.9]])
    assert cut_below(confidence, 0.5).tolist() == [1, 3, 0]


def test_the_calibration_error_is_the_gap_of_each_bin_weighted_by_its_count():
    probability, label = np.array([0.12, 0.18, 0.95, 1.0]), np.array([False, True, True, True])
    assert expected_calibration_error(probability, label) == pytest.approx(
        (abs(0.3 - 1) + abs(1.95 - 2)) / 4
    )
    filled = [part for part in reliability(probability, label) if part.count]
    assert [(part.low, part.high, part.count, part.accepted) for part in filled] == [
        (0.1, 0.2, 2, 0.5),
        (0.9, 1.0, 2, 1.0),
    ]
    assert [part.confidence for part in filled] == pytest.approx([0.15, 0.975])


def test_auroc_counts_pairs_in_the_right_order_and_ties_half():
    rng = np.random.default_rng(1)
    for _ in range(20):
        probability, label = rng.integers(0, 6, 40) / 6, rng.random(40) < 0.4
        pairs = [
            (yes > no) + 0.5 * (yes == no)
            for yes in probability[label]
            for no in probability[~label]
        ]
        assert auroc(probability, label) == pytest.approx(np.mean(pairs))
    assert auroc(np.array([0.1, 0.9]), np.array([True, True])) is None


def test_brier_is_the_mean_squared_distance():
    found = measures(np.array([0.5, 1.0]), np.array([True, False]))
    assert found.brier == pytest.approx((0.25 + 1.0) / 2)


def test_nothing_measured_is_said_to_be_nothing():
    found = measures(np.zeros(0), np.zeros(0, dtype=bool))
    assert (found.ece, found.auroc, found.brier, found.count) == (None, None, None, 0)
