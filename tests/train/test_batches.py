"""What is trained on at a step: a function of seed and step, every sample once an epoch."""

import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.cache.index import Index
from deepspec.cache.reader import HiddenCache
from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed
from deepspec.train import batches
from deepspec.train.batches import StepData
from deepspec.train.distributed import World
from deepspec.train.draft_artifact import make_draft
from tests.conftest import tiny_run


def step_data(cache: HiddenCache, config: RunConfig) -> StepData:
    """The steps of a training on one rank."""
    alone = World(0, 1, torch.device("cpu"))
    return StepData(cache, config, alone)


def test_two_seeds_give_two_orders_and_one_seed_one(captured: Path):
    config = tiny_run(captured)
    cache = HiddenCache(Run(config).artifact("hidden"))
    orders = [
        [
            step_data(cache, tiny_run(captured, f"train.seed={seed}")).drawn(step)
            for step in range(3)
        ]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_every_training_sample_comes_once_an_epoch_and_held_out_ones_never(captured: Path):
    config = tiny_run(captured, "train.global_batch=1", "train.max_steps=null")
    cache = HiddenCache(Run(config).artifact("hidden"))
    data = step_data(cache, config)
    epoch = [data.drawn(step)[0].number for step in range(len(data.numbers))]
    held_out = set((cache.index.held_out == 1).nonzero()[0].tolist())
    assert sorted(epoch) == sorted(data.numbers.tolist())
    assert held_out
    assert not held_out & set(epoch)


def test_a_samples_chance_changes_with_epoch_seed_and_sample(captured: Path):
    sets = ("train.global_batch=1", "train.max_steps=null", "train.epochs=2")
    seeds = []
    for seed in (1, 2):
        config = tiny_run(captured, *sets, f"train.seed={seed}")
        data = step_data(HiddenCache(Run(config).artifact("hidden")), config)
        seeds += [data.drawn(step)[0].seed for step in range(data.total_steps)]
    assert len(set(seeds)) == len(seeds) == 4 * len(data.numbers)


def test_a_cache_without_a_training_sample_is_refused(captured: Path):
    config = tiny_run(captured)
    cache = HiddenCache(Run(config).artifact("hidden"))
    cache.index = Index(*(column[:0] for column in cache.index))
    with pytest.raises(TrainingFailed, match="no training sample"):
        step_data(cache, config)


@pytest.mark.parametrize("recipe", ["demo", "eagle3-demo"])
def test_micro_batches_keep_to_a_budget_of_tokens_and_one_of_slots(
    captured: Path, tmp_path: Path, recipe: str
):
    """8,192 tokens of short answers had twice the slots, and memory, of as many of long ones."""
    cache = HiddenCache(Run(tiny_run(captured)).artifact("hidden"))
    sets = ("train.global_batch=16", "train.max_steps=3", "resources.memory.batch_tokens=200")
    if recipe != "demo":
        sets = (*sets, "target.layer_ids=[0, 1, 2]")
    loose = step_data(cache, tiny_run(tmp_path, *sets, recipe=recipe))
    most = max(drawn.num_slots for drawn in loose.drawn(0)) * 2
    tight = step_data(
        cache, tiny_run(tmp_path, *sets, f"resources.memory.batch_slots={most}", recipe=recipe)
    )
    draft = make_draft(tiny_run(tmp_path, *sets, recipe=recipe), cache, torch.device("cpu"))
    for step in range(3):
        groups = tight.micro_batches(step)
        assert [drawn for group in groups for drawn in group] == tight.drawn(step)
        assert len(groups) > len(loose.micro_batches(step))
        for group, following in pairwise([*groups, []]):
            tokens, slots = (
                [getattr(drawn, name) for drawn in [*group, *following[:1]]]
                for name in ("num_tokens", "num_slots")
            )
            own = len(group)
            assert sum(tokens[:own]) <= 200
            assert sum(slots[:own]) <= most
            assert not following or sum(tokens) > 200 or sum(slots) > most, "room was left"
            counted = int(draft.plan(tight.load(group)).counted.sum())
            assert 0 < counted <= sum(slots[:own]), "what the draft predicts is what is budgeted"


def test_a_sample_over_the_budget_of_slots_is_a_micro_batch_of_its_own(captured: Path):
    config = tiny_run(captured, "resources.memory.batch_slots=1")
    data = step_data(HiddenCache(Run(config).artifact("hidden")), config)
    assert [len(group) for group in data.micro_batches(0)] == [1] * config.train.global_batch


def test_a_sample_is_drawn_once_however_many_look_at_its_step(
    captured: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was drawn five times: to read it, to batch it, to count batches twice, to count tokens."""
    config = tiny_run(captured)
    data = step_data(HiddenCache(Run(config).artifact("hidden")), config)
    seeds: list[int] = []
    original = batches.stream_seed
    monkeypatch.setattr(batches, "stream_seed", lambda *parts: seeds.append(1) or original(*parts))
    for step in range(data.total_steps):
        assert len(list(data.batches(step, len))) == len(data.micro_batches(step))
        assert data.drawn(step)
    num_samples = data.total_steps * config.train.global_batch
    assert num_samples <= len(seeds) <= num_samples + 2 * config.train.global_batch


def test_a_micro_batch_without_room_beside_the_one_in_use_is_read_again(
    captured: Path, monkeypatch: pytest.MonkeyPatch
):
    """Memory is shortest while the one in use is computed; then the next one is read, too."""
    config = tiny_run(captured, "resources.memory.batch_tokens=150")
    cache = HiddenCache(Run(config).artifact("hidden"))
    real, failed = StepData._batch, list[int]()
    undisturbed, short = (step_data(cache, config) for _ in range(2))

    def batch(self, group, samples):
        if self is short and threading.current_thread() is not threading.main_thread():
            failed.append(len(group))
            if len(failed) % 3:
                for _ in range(len(failed) % 3 - 1):
                    next(samples)  # memory ends before the first sample, or after it
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, group, samples)

    monkeypatch.setattr(StepData, "_batch", batch)
    for data in (undisturbed, short):
        data.begin(0)
    for step in range(undisturbed.total_steps):
        pairs = zip(short.batches(step, len), undisturbed.batches(step, len), strict=True)
        for (found, plan), (wanted, _) in pairs:
            assert found.seeds == wanted.seeds
            assert all(map(torch.equal, found[:-1], wanted[:-1]))
            assert plan == len(found), "made of it wherever it was read"
    assert len(failed) > 6
    assert max(failed) > 1
