"""Three sources of hidden states side by side, with numbers small enough to work out by hand."""

import pytest

from deepspec.plan.parts import Facts, Number, SourcesPart
from deepspec.plan.source_choice import compare_sources
from tests.plan.test_forecast import FACTS, WORK, config_of, plan_of

# 100 shards of 1 GB; a pass takes 8 GPUs 2 hours, training 10.
LARGE = FACTS._replace(lanes=8, speed=FACTS.speed._replace(device="cuda"), free_bytes=1000e9)


def exactly(value: float) -> Number:
    return Number(value, "by hand")


def compared(facts: Facts = LARGE, *overrides: str, passes: float = 10.0) -> SourcesPart:
    plan, missing = plan_of(facts), 100e9 * facts.missing + (1e9 if facts.missing else 0)
    return compare_sources(
        config_of(
            "train.epochs=10",
            "train.window_shards=4",
            "resources.training.rolling_gb=10",
            "resources.storage.min_free_gb=0",
            *overrides,
        ),
        facts,
        size=plan.size._replace(
            num_bytes=exactly(100e9),
            missing_bytes=exactly(missing),
            frozen_bytes=exactly(1e9),
            shard_bytes=exactly(1e9),
            shards=exactly(100),
        ),
        capture=plan.capture._replace(hours=exactly(2.0)),
        training=plan.training._replace(hours=exactly(10.0), passes=exactly(passes)),
    )


def test_the_cache_is_captured_once_and_chosen_where_it_fits():
    part = compared()
    assert part.option("cache")[1:] == (101e9, 1.0, 16.0, 12.0, True)
    assert (part.best, part.chosen) == ("cache", "cache")


def test_rolling_captures_once_in_window_epochs_on_gpus_of_its_own():
    """5 rounds x 16 GPU hours on 2 GPUs take 40 hours; training on the other 6 takes 13.3."""
    option = compared(LARGE, "train.window_epochs=2", "resources.training.rolling_gpus=2").option(
        "rolling"
    )
    assert option[1:] == (11e9, 5.0, 80.0, 40.0, True)
    alone = compared(FACTS, "train.window_epochs=2").option("rolling")
    assert alone.hours == 5 * 2 + 10


def test_rolling_captures_once_what_it_may_keep_as_a_whole():
    assert compared(LARGE, "resources.training.rolling_gb=100").option("rolling").captures == 1.0
    assert (
        compared(LARGE, "resources.training.rolling_gb=100", passes=0.5).option("rolling").captures
        == 0.5
    )
    assert compared(LARGE, "resources.training.rolling_gb=99").option("rolling").captures == 10.0


def test_rolling_needs_two_windows_whatever_it_is_allowed():
    assert compared(LARGE, "train.window_shards=20").option("rolling").num_bytes == 41e9


def test_online_captures_training_samples_in_every_pass_and_keeps_nothing():
    option = compared(LARGE, "prompts.held_out=0.5").option("online")
    assert option[1:] == (1e9, 5.0, 80.0, 20.0, True)


@pytest.mark.parametrize(
    ("overrides", "free_gb", "best", "said"),
    [
        (
            ["train.window_epochs=5"],
            50,
            "rolling",
            "a shard is captured once in train.window_epochs 5",
        ),
        ([], 50, "online", "the target must fit into memory with the draft"),
        (["train.window_epochs=5"], 5, "online", "the cache needs 101 GB, which do not fit"),
    ],
)
def test_what_does_not_fit_is_marked_and_the_cheapest_of_the_others_recommended(
    overrides, free_gb: float, best: str, said: str
):
    part = compared(LARGE._replace(free_bytes=free_gb * 1e9), *overrides)
    assert part.best == best
    assert said in part.reason
    assert part.option("cache").fits is False


def test_where_the_size_is_unknown_nothing_is_said_to_fit():
    found = compared(LARGE._replace(work=WORK._replace(prompts=None)))
    assert [option.fits for option in found.options] == [None] * 3


def test_a_cache_that_is_there_is_what_a_run_reads():
    assert (
        compared(LARGE._replace(missing=0.0), "resources.training.source=rolling").chosen == "cache"
    )
