"""The simulator of policies: figures by hand, and what a result says of them."""

import json

import numpy as np
import pytest

from deepspec.evaluate.rounds import Rounds, read_rounds, split_by_prompt
from deepspec.evaluate.scheduler import Fixed, Threshold
from deepspec.evaluate.simulate import simulate, simulate_policies
from deepspec.evaluate.speed_curve import SpeedCurve
from tests.evaluate.made_rounds import made_rows

# Two rounds of two slots, which every request alternates between: both slots accepted, and none.
TWO = Rounds(np.array([[0.9, 0.9], [0.2, 0.2]]), np.array([2, 0]), np.array([0, 1]))
CURVE = SpeedCurve([1, 2, 3, 4, 5, 6], [10.0, 8.0, 5.0, 4.0, 2.5, 2.0])


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
