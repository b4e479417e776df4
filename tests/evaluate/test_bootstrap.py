"""Intervals that hold what they say, and fall alike for everybody who asks."""

import numpy as np

from deepspec.evaluate.bootstrap import RESAMPLES, intervals, pool, resample, weights
from deepspec.evaluate.counts import Sums, add_up
from tests.evaluate.made_results import made_rows


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
