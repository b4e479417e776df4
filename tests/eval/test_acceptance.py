"""Metrics from hand-computed rounds (trap E4)."""

from __future__ import annotations

import pytest

from deepspec.eval.acceptance import acceptance_length, conditional_acceptance, prefix_acceptance, summarise, verify_rate

# Two prompts, block size 3. Committed = accepted + bonus, but for the last round, which ended on an accepted stop token.
ROWS = [
    {"proposed": [3, 3], "accepted": [3, 0], "committed": [4, 1]},
    {"proposed": [3, 3], "accepted": [1, 2], "committed": [2, 2]},
]


def test_acceptance_length_counts_the_bonus_but_not_after_a_stop_token():
    assert acceptance_length(ROWS) == (4 + 1 + 2 + 2) / 4


def test_prefix_acceptance_is_the_share_of_rounds_that_got_that_far():
    assert prefix_acceptance(ROWS) == [3 / 4, 2 / 4, 1 / 4]


def test_conditional_acceptance_looks_only_at_rounds_that_got_there():
    assert conditional_acceptance(ROWS) == [3 / 4, 2 / 3, 1 / 2]


def test_a_round_that_proposed_less_does_not_count_against_later_positions():
    rows = [{"proposed": [1, 3], "accepted": [1, 1], "committed": [2, 2]}]
    assert prefix_acceptance(rows) == [1.0, 0.0, 0.0]
    assert conditional_acceptance(rows) == [1.0, 0.0, 0.0]


def test_verify_rate_is_what_was_of_use_of_all_verified_positions():
    assert verify_rate(ROWS) == 9 / (12 + 4)


def test_nothing_decoded_gives_zeros_and_no_division():
    assert (acceptance_length([]), verify_rate([]), prefix_acceptance([])) == (0.0, 0.0, [])


def test_speed_up_is_the_ratio_of_tokens_per_second():
    timing = {"num_tokens": 10, "plain_tokens": 10, "seconds": 1.0, "plain_seconds": 2.0, "draft_seconds": 0.2, "verify_seconds": 0.7}
    summary = summarise([{**row, **timing, "identical": True} for row in ROWS])
    assert summary["speedup"] == pytest.approx(2.0)
    assert summary["tokens_per_s"] == {"plain": 5.0, "speculative": 10.0}
    assert summary["lossless"] == [2, 2]
