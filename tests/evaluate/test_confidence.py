"""What a result shows of confidence: slots measured where they were tested, prompts kept apart, and
policies simulated, with figures by hand.
"""

import json

import numpy as np
import pytest

from deepspec.artifacts.results import CalibrationSummary, RoundCounts, ThresholdPoint
from deepspec.evaluate.calibration import fit_calibration, fit_temperatures
from deepspec.evaluate.confidence import (
    cumulative,
    per_position,
    simulate,
    simulate_policies,
    summarise_confidence,
    threshold_sweep,
)
from deepspec.evaluate.rounds import Rounds, read_rounds, split_by_prompt
from deepspec.evaluate.scheduler import Fixed, Threshold
from deepspec.evaluate.speed_curve import SpeedCurve
from tests.evaluate.made_rounds import made_rows

CURVE = SpeedCurve([1, 2, 3, 4, 5, 6], [10.0, 8.0, 5.0, 4.0, 2.5, 2.0])
# Three rounds of two slots: all accepted, the first alone, none.
THREE = Rounds(
    np.array([[0.9, 0.8], [0.75, 0.3], [0.2, 0.6]]), np.array([2, 1, 0]), np.array([0, 0, 1])
)
# Two rounds of two slots, which every request alternates between: both slots accepted, and none.
TWO = Rounds(np.array([[0.9, 0.9], [0.2, 0.2]]), np.array([2, 0]), np.array([0, 1]))


def summarised(rows, block_size: int) -> CalibrationSummary:
    calibration = fit_calibration(rows, block_size)
    assert calibration is not None
    return summarise_confidence(calibration, rows, block_size, CURVE)[0]


def test_a_slot_is_measured_only_where_it_was_put_to_the_test():
    first, second = per_position(THREE)
    assert (first.count, second.count) == (3, 2)
    assert second.brier == pytest.approx((0.2**2 + 0.3**2) / 2)


def test_the_product_is_measured_on_every_round():
    first, second = cumulative(THREE)
    assert first == per_position(THREE)[0]
    assert second.count == 3
    assert second.brier == pytest.approx((0.28**2 + 0.225**2 + 0.12**2) / 3)


def test_hidden_temperatures_are_found_and_mend_prompts_that_were_not_fitted_on():
    hidden = (2.5, 0.5, 1.0)
    rows = made_rows(60, 200, temperatures=hidden)
    found = summarised(rows, 3)
    assert found.temperatures == pytest.approx(hidden, rel=0.25)
    assert found.fitted_on == found.reported_on == RoundCounts(rounds=6000, prompts=30)
    for kind, slots in (("positions", (0, 1)), ("cumulative", (0, 1, 2))):
        for slot in slots:
            place = getattr(found, kind)[slot]
            assert place.position == slot + 1
            assert place.after.ece < 0.5 * place.before.ece
            assert sum(part.count for part in place.after.bins) == place.after.count
    one = found.positions[0]
    # a temperature keeps the order within a slot
    assert one.after.auroc == pytest.approx(one.before.auroc)
    json.dumps(found.model_dump(), allow_nan=False)


def test_what_is_reported_was_not_fitted_on():
    """Prompts with numbers of rounds of their own show which of them went where."""
    rows = [
        {**each, "prompt": number}
        for number in range(6)
        for each in made_rows(1, 100 + number, temperatures=(1.0,), seed=number)
    ]
    fitted, reported = split_by_prompt(read_rounds(rows, 1))
    found = summarised(rows, 1)
    assert (found.fitted_on.rounds, found.reported_on.rounds) == (
        len(fitted.accepted),
        len(reported.accepted),
    )
    assert len(fitted.accepted) != len(reported.accepted)
    assert found.temperatures == fit_temperatures(fitted)
    assert found.positions[0].before == per_position(reported)[0]


def test_policies_serve_no_prompts_that_the_temperatures_were_fitted_on():
    rows = made_rows(4, 110, temperatures=(1.0, 1.0))
    fitted = set(split_by_prompt(read_rounds(rows, 2))[0].prompt.tolist())
    perfect = [
        {**row, "accepted": [2] * 110, "committed": [3] * 110} if row["prompt"] in fitted else row
        for row in rows
    ]
    calibration = fit_calibration(rows, 2)
    assert calibration is not None
    found, wanted = (
        summarise_confidence(calibration, chosen, 2, CURVE)[1] for chosen in (perfect, rows)
    )
    assert found == wanted


def test_the_sweep_replays_what_a_threshold_would_have_proposed():
    points = {point.threshold: point for point in threshold_sweep(THREE)}
    none, some, many = (points[threshold] for threshold in (0.0, 0.7, 0.95))
    assert none == ThresholdPoint(
        threshold=0.0, acceptance_length=6 / 3, verify_rate=6 / 9, proposed_per_round=2.0
    )
    # Cut to 2, 1, 0 slots: 2 + 1 + 0 accepted and three bonus tokens.
    assert some == ThresholdPoint(
        threshold=0.7, acceptance_length=6 / 3, verify_rate=6 / 6, proposed_per_round=1.0
    )
    assert many == ThresholdPoint(
        threshold=0.95, acceptance_length=1.0, verify_rate=1.0, proposed_per_round=0.0
    )


def reported(rows, block_size: int) -> Rounds:
    return split_by_prompt(read_rounds(rows, block_size))[1]


@pytest.mark.parametrize(
    ("length", "committed", "seconds"), [(0, 1 + 1, 0.1), (1, 2 + 1, 0.125), (2, 3 + 1, 0.2)]
)
def test_one_request_at_a_fixed_length(length: int, committed: int, seconds: float):
    found = simulate(TWO, Fixed(length), CURVE, requests=1)
    assert found.throughput == found.per_user == pytest.approx(committed / (2 * seconds))
    assert found.verified_per_round == length
    assert found.lengths == [float(number == length) for number in range(3)]


def test_two_requests_share_the_step_and_its_time():
    """They begin half the rounds apart: each step has one of either kind, 3 tokens and 1, in 6
    / 2.0 = 0.5 seconds.
    """
    found = simulate(TWO, Fixed(2), CURVE, requests=2)
    assert found.throughput == pytest.approx((3 + 1) / 0.5)
    assert found.per_user == pytest.approx(found.throughput / 2)


def test_a_threshold_verifies_the_sure_round_alone():
    found = simulate(TWO, Threshold(0.5), CURVE, requests=1)
    assert found.throughput == pytest.approx((3 + 1) / (0.2 + 0.1))
    assert found.verified_per_round == 1.0
    assert found.lengths == [0.5, 0.0, 0.5]


def test_the_scheduler_is_never_far_from_the_best_fixed_length_on_calibrated_rounds():
    rows = made_rows(40, 50, temperatures=(1.0,) * 4, seed=1)
    curve = SpeedCurve([1, 64, 4096], [50.0, 50.0, 50.0 / 64])
    found = simulate_policies(reported(rows, 4), curve, requests=(1, 16, 64))
    policies = found.policies
    assert policies["full"] == policies["fixed@4"]
    for number, point in enumerate(policies["scheduled"]):
        assert point.throughput > 0.99 * max(
            policies[f"fixed@{length}"][number].throughput for length in range(5)
        )
    json.dumps(found.model_dump(), allow_nan=False)


def test_a_summary_names_every_policy_at_every_number_of_requests():
    rounds = reported(made_rows(4, 10, temperatures=(1.0, 1.0)), 2)
    found = simulate_policies(rounds.calibrated((1.0, 2.0)), CURVE, requests=(1, 3))
    assert found.requests == [1, 3]
    assert found.curve == CURVE.points()
    names = {
        "full",
        "fixed@0",
        "fixed@1",
        "fixed@2",
        "threshold@0.2",
        "threshold@0.4",
        "threshold@0.6",
        "threshold@0.8",
        "scheduled",
    }
    assert set(found.policies) == names
    for points in found.policies.values():
        assert [point.requests for point in points] == [1, 3]


def test_every_policy_meets_the_same_rounds():
    found = simulate_policies(TWO, SpeedCurve([1, 100], [1.0, 1.0]), requests=(3,)).policies
    assert found["scheduled"][0].throughput == pytest.approx(found["full"][0].throughput)
