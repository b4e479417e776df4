"""Three sources of hidden states side by side, with numbers small enough to work out by hand."""

from pathlib import Path

import pytest

from deepspec.config.draft import TrainConfig
from deepspec.config.resources import TrainingConfig
from deepspec.plan.arithmetic import Fit
from deepspec.plan.source_choice import Effort, compare_sources
from tests.conftest import tiny_run

# 100 shards of 1 GB; a pass takes 8 GPUs 2 hours, training 10.
EFFORT = Effort(
    cache_bytes=100e9,
    missing_bytes=101e9,
    once_bytes=1e9,
    shard_bytes=1e9,
    num_shards=100,
    capture_hours=2.0,
    capture_hours_left=2.0,
    train_hours=10.0,
    passes=10.0,
    lanes=8,
    device="cuda",
)


def compared(effort: Effort = EFFORT, *overrides: str, free_gb: float = 1000.0):
    config = tiny_run(
        Path("/nowhere"),
        "train.window_shards=4",
        "resources.training.rolling_gb=10",
        "prompts.held_out=0",
        *overrides,
    )
    return compare_sources(
        effort,
        config.train,
        config.resources.training,
        held_out=config.prompts.held_out,
        room=lambda needed: Fit(needed, free_gb * 1e9, 0.0),
    )


def test_the_cache_is_captured_once_and_chosen_where_it_fits():
    part = compared()
    assert part.option("cache")[1:] == (101e9, 1.0, 16.0, 12.0, True)
    assert (part.best, part.chosen) == ("cache", "cache")


def test_rolling_captures_once_in_window_epochs_on_gpus_of_its_own():
    """5 rounds x 16 GPU hours on 2 GPUs take 40 hours; training on the other 6 takes 13.3."""
    option = compared(EFFORT, "train.window_epochs=2", "resources.training.rolling_gpus=2").option(
        "rolling"
    )
    assert option[1:] == (11e9, 5.0, 80.0, 40.0, True)
    alone = compared(EFFORT._replace(lanes=1, device="cpu"), "train.window_epochs=2").option(
        "rolling"
    )
    assert alone.hours == 5 * 2 + 10


def test_rolling_captures_once_what_it_may_keep_as_a_whole():
    assert compared(EFFORT, "resources.training.rolling_gb=100").option("rolling").captures == 1.0
    assert (
        compared(EFFORT._replace(passes=0.5), "resources.training.rolling_gb=100")
        .option("rolling")
        .captures
        == 0.5
    )
    assert compared(EFFORT, "resources.training.rolling_gb=99").option("rolling").captures == 10.0


def test_rolling_needs_two_windows_whatever_it_is_allowed():
    assert compared(EFFORT, "train.window_shards=20").option("rolling").num_bytes == 41e9


def test_online_captures_training_samples_in_every_pass_and_keeps_nothing():
    option = compared(EFFORT, "prompts.held_out=0.5").option("online")
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
    part = compared(EFFORT, *overrides, free_gb=free_gb)
    assert part.best == best
    assert said in part.reason
    assert part.option("cache").fits is False


def test_where_the_size_is_unknown_nothing_is_said_to_fit():
    train, settings = TrainConfig(), TrainingConfig()
    found = compare_sources(EFFORT, train, settings, held_out=0.0, room=None)
    assert [option.fits for option in found.options] == [None] * 3


def test_a_cache_that_is_there_is_what_a_run_reads():
    assert (
        compared(EFFORT._replace(missing_bytes=0.0), "resources.training.source=rolling").chosen
        == "cache"
    )
