"""Metrics from hand-computed rounds (trap E4), and intervals that hold the truth as often as they
claim to, and are equal for everyone who computes them.
"""

import numpy as np
import pytest

from deepspec.evaluate.counts import RESAMPLES, Sums, add_up, intervals, pool, resample, weights
from tests.evaluate.made_results import made_rows

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


def test_every_resample_draws_as_many_as_there_are_with_replacement():
    drawn = weights(50, key="a")
    assert drawn.shape == (RESAMPLES, 50)
    assert (drawn.sum(1) == 50).all()
    assert drawn.max() > 1 and drawn.min() == 0
    assert abs(drawn.mean(0) - 1).max() < 0.2


def test_equal_keys_draw_alike_and_others_otherwise():
    assert (weights(9, key=("gsm8k", 0.0)) == weights(9, key=("gsm8k", 0.0))).all()
    assert (weights(9, key=("gsm8k", 0.0)) != weights(9, key=("gsm8k", 1.0))).any()


def test_a_resample_is_the_metric_of_the_rows_that_were_drawn():
    """The vectorised sums against the plain way: repeat the rows, count again."""
    rows = made_rows(benchmarks={"gsm8k": ("math", 0.8)}, prompts=6)
    sums = add_up([[row] for row in rows], 7)
    drawn = weights(6, key="x")[:5]
    by_hand = []
    for counts in drawn.astype(int).tolist():
        again = [row for row, times in zip(rows, counts, strict=True) for _ in range(times)]
        by_hand.append(
            sum(sum(row["committed"]) for row in again)
            / sum(len(row["committed"]) for row in again)
        )
    assert np.allclose(resample(sums, key="x").sums.acceptance_length()[1:6], by_hand)


def test_the_interval_of_a_mean_holds_the_truth_about_95_times_in_100():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        committed = rng.exponential(3.0, 80)
        ones, none = np.ones(80), np.zeros((80, 0))
        sums = Sums(ones, committed, ones, none, none, none, *[ones] * 6)
        drawn = resample(sums, key=trial)
        low, high = drawn.interval(drawn.sums.acceptance_length())
        held += low <= 3.0 <= high
    assert 175 <= held <= 199


def test_prompts_decoded_together_are_drawn_together():
    rows = made_rows(benchmarks={"gsm8k": ("math", 0.8)}, prompts=8, batch_sizes=[4])
    times = add_up([rows[:4], rows[4:]])
    found = resample(times, key="x").sums.speedup()[1:]
    assert len(np.unique(found.round(9))) == 3, (
        "of two groups: the one twice, the other twice, or both"
    )


def test_benchmarks_pooled_are_the_sum_of_theirs():
    rows = made_rows(prompts=3)
    halves = [
        resample(add_up([[row] for row in part], 7), key=number)
        for number, part in enumerate((rows[:4], rows[4:]))
    ]
    found = pool(halves)
    assert found.num_units == 9 and found.varies
    assert found.sums.committed[0] == sum(sum(row["committed"]) for row in rows)
    assert (found.sums.rounds == halves[0].sums.rounds + halves[1].sums.rounds).all()


def test_single_prompts_have_no_interval_alone_or_pooled():
    one = [resample(add_up([[row]], 7), key=row["benchmark"]) for row in made_rows(prompts=1)]
    assert [part.interval(part.sums.acceptance_length()) for part in [*one, pool(one)]] == [
        None
    ] * 4


def test_what_no_resample_knows_has_no_interval():
    values = np.array([[0.6, np.nan], [0.5, np.nan], [0.7, np.nan]])
    (low, high), unknown = intervals(values)
    assert 0.5 <= low < high <= 0.7
    assert unknown is None


def test_shares_that_were_the_same_in_every_round_are_not_called_certain():
    sums = Sums(*[np.ones(5)] * 3, *[np.ones((5, 1))] * 3, *[np.ones(5)] * 6)
    assert intervals(resample(sums, key="x").sums.conditional_acceptance()) == [None]
