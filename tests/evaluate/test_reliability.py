"""Measures of probabilities against labels, by hand."""

import numpy as np
import pytest

from deepspec.evaluate.reliability import auroc, expected_calibration_error, measures, reliability


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
