"""Metrics from hand-computed rounds (trap E4)."""

import numpy as np
import pytest

from deepspec.evaluate.counts import Sums, add_up

# Two prompts, block size 3. Committed = accepted + bonus, but for the last round, which ended on an
# accepted stop token.
ROWS = [
    {"proposed": [3, 3], "accepted": [3, 0], "committed": [4, 1]},
    {"proposed": [3, 3], "accepted": [1, 2], "committed": [2, 2]},
]


TIMING = {
    "num_tokens": 10,
    "plain_tokens": 20,
    "seconds": 1.0,
    "plain_seconds": 4.0,
    "draft_seconds": 0.2,
    "verify_seconds": 0.7,
}


def sums(rows):
    longest = max((proposed for row in rows for proposed in row["proposed"]), default=0)
    return Sums(*(part.sum(axis=0) for part in of_units([[row] for row in rows], longest)))


def of_units(units, positions):
    return add_up([[{**row, **TIMING} for row in unit] for unit in units], positions)


def test_acceptance_length_counts_the_bonus_but_not_after_a_stop_token():
    assert sums(ROWS).acceptance_length() == (4 + 1 + 2 + 2) / 4


def test_prefix_acceptance_is_the_share_of_rounds_that_got_that_far():
    assert sums(ROWS).prefix_acceptance().tolist() == [3 / 4, 2 / 4, 1 / 4]


def test_conditional_acceptance_looks_only_at_rounds_that_got_there():
    assert sums(ROWS).conditional_acceptance().tolist() == [3 / 4, 2 / 3, 1 / 2]


def test_a_round_that_proposed_less_does_not_count_against_later_positions():
    rows = [{"proposed": [1, 3], "accepted": [1, 1], "committed": [2, 2]}]
    assert sums(rows).prefix_acceptance().tolist() == [1.0, 0.0, 0.0]
    found = sums(rows).conditional_acceptance()
    assert found[:2].tolist() == [1.0, 0.0]
    assert np.isnan(found[2]), "no round accepted two, so that nothing is known of the third"


def test_a_round_that_proposed_nothing_is_a_round_of_its_one_token():
    rows = [{"proposed": [0, 2], "accepted": [0, 2], "committed": [1, 3]}]
    assert sums(rows).acceptance_length() == 2
    assert sums(rows).verify_rate() == 4 / (2 + 2)
    assert sums(rows).prefix_acceptance().tolist() == [1.0, 1.0]


def test_verify_rate_is_what_was_of_use_of_all_verified_positions():
    assert sums(ROWS).verify_rate() == 9 / (12 + 4)


def test_the_turns_of_one_prompt_are_added():
    assert of_units([ROWS], 3).committed.tolist() == [9]
    assert of_units([[row] for row in ROWS], 3).committed.tolist() == [5, 4]


def test_nothing_decoded_is_not_a_number_and_no_division():
    nothing = sums([{"proposed": [], "accepted": [], "committed": []}])
    assert np.isnan(nothing.acceptance_length()) and np.isnan(nothing.verify_rate())
    assert nothing.prefix_acceptance().tolist() == []


def test_speed_up_is_the_ratio_of_tokens_per_second():
    times = sums(ROWS * 2)
    assert (times.tokens_per_s(), times.plain_tokens_per_s()) == (10.0, 5.0)
    assert times.speedup() == pytest.approx(2.0)
