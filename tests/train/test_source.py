"""Training from all three sources: the same samples in the same order, the same losses, the same draft."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from deepspec.artifact import Artifact
from deepspec.data.cache import HiddenCache
from deepspec.data.chat import load_chat
from deepspec.data.feeder import shard_bytes
from deepspec.data.online import OnlineStates, open_online, open_unsealed
from deepspec.data.planned import Planned, plan_samples, read_planned
from deepspec.events import silent
from deepspec.lineage import artifact_of
from deepspec.train.loop import run_train
from tests.conftest import tiny_run
from tests.train.test_loop import weights

ALONE = "resources.batch_tokens=1"  # every sample by itself, in capture and in training: then the arithmetic is the same to the last bit


@pytest.fixture(scope="session")
def answered(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with answers and no hidden states; copy it before training."""
    store = tmp_path_factory.mktemp("answered") / "store"
    shutil.copytree(captured, store)
    shutil.rmtree(store / "hidden")
    return store


@pytest.fixture
def fresh(answered: Path, tmp_path: Path) -> Path:
    shutil.copytree(answered, tmp_path / "fresh")
    return tmp_path / "fresh"


def losses(artifact: Artifact) -> list[float]:
    lines = artifact.store.read(artifact.path("metrics.jsonl")).decode().splitlines()
    return [line[name] for line in map(json.loads, lines) for name in ("loss", "held_out_acceptance_length") if name in line]


def difference(first: Artifact, second: Artifact) -> float:
    """The largest relative difference of a trained tensor."""
    one, other = weights(first), weights(second)
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-12)) for name in one)


@pytest.mark.parametrize("setting", [[], ["hidden.last_hidden=none", "draft.algorithm=dflash", "draft.markov=null", "draft.confidence=null",
                                          "loss.ce=1", "loss.tv=0"]])  # fmt: skip
def test_the_planned_index_is_that_of_the_sealed_cache(captured: Path, fresh: Path, setting: list[str]):
    from deepspec.data.capture import run_capture

    config = tiny_run(fresh, *setting)
    stage = open_unsealed(config)
    plan_samples(config, stage, load_chat(config), shards=[3, 1])
    made = {
        name: (fresh / stage.artifact.folder / "planned" / name).stat().st_mtime_ns
        for name in stage.artifact.store.names(stage.artifact.path("planned"))
    }
    assert len(made) == 2
    plan_samples(config, stage, load_chat(config))
    planned = read_planned(stage)
    index = HiddenCache(run_capture(config)).index
    for name in set(Planned._fields) - {"answer"}:
        assert getattr(planned, name).tolist() == getattr(index, name).tolist(), name
    assert made.items() <= {path.name: path.stat().st_mtime_ns for path in (fresh / stage.artifact.folder / "planned").iterdir()}.items()


def opened(store: Path, *overrides: str) -> OnlineStates:
    return open_online(tiny_run(store, *overrides), is_first=True, report=silent)


def test_states_computed_online_are_those_of_the_cache(captured: Path, fresh: Path):
    cache, online = HiddenCache(artifact_of(tiny_run(captured), "hidden")), opened(fresh)
    order = [7, 0, 11, 3, 3, 1]
    for number, found in zip(order, online.stream(iter(order), max_bytes=100_000, threads=2), strict=True):
        wanted = cache[number]
        assert found.sample_id == wanted.sample_id == online[number].sample_id
        assert torch.equal(found.input_ids, wanted.input_ids) and torch.equal(found.loss_mask, wanted.loss_mask)
        assert torch.equal(found.last_spans, wanted.last_spans)
        torch.testing.assert_close(found.context.decode(), wanted.context.decode(), atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(found.last_hidden.decode(), wanted.last_hidden.decode(), atol=2e-2, rtol=1e-2)
        assert found.num_bytes <= online.layout.most_bytes(len(found.input_ids), len(found.last_hidden.parts[0]))


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_online_training_ends_bit_for_bit_like_that_from_the_cache_where_batches_are_the_same(fresh: Path, tmp_path: Path, codec: str):
    from deepspec.data.capture import run_capture

    shutil.copytree(fresh, tmp_path / "cached")
    config = tiny_run(tmp_path / "cached", ALONE, f"hidden.codec={codec}")
    run_capture(config)
    cached = run_train(config)
    online = run_train(tiny_run(fresh, ALONE, f"hidden.codec={codec}", "resources.source=online"))
    assert losses(online) == losses(cached)
    assert difference(cached, online) == 0
    assert not list(fresh.glob("hidden/*/shards/*"))


def test_online_training_ends_like_that_from_the_cache_but_for_rounding(captured: Path, fresh: Path, tmp_path: Path):
    shutil.copytree(captured, tmp_path / "cached")
    cached, online = run_train(tiny_run(tmp_path / "cached")), run_train(tiny_run(fresh, "resources.source=online"))
    print(difference(cached, online), losses(cached), losses(online))
    assert losses(online) == pytest.approx(losses(cached), rel=1e-3)
    assert difference(cached, online) < 1e-2


# Three windows of two shards each epoch, and a disk that holds two windows and not three.
ROLLING = ["resources.source=rolling", "train.window_shards=2", "train.max_steps=null", "train.epochs=2"]


def budget_gb(store: Path, shards: int) -> float:
    """What the largest `shards` shards of the run take at most."""
    config = tiny_run(store)
    online = opened(store)
    sizes = sorted(shard_bytes(online.index, online.layout).values())
    assert config.prompts.shard_rows == 4
    return sum(sizes[-shards:]) / 1e9


class Watched:
    """The bytes of shards, index rows and staged files under a store, looked at all the time; and which shards came when."""

    def __init__(self, store: Path) -> None:
        self.store, self.most, self.captures = store, 0, 0
        self._seen: set[tuple[str, int]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            total = 0
            for path in [*self.store.glob("hidden/*/shards/*"), *self.store.glob("hidden/*/rows/*"), *self.store.glob(".staged/*")]:
                if f"-{os.getpid()}-" in path.name:  # a checkpoint of this process, no hidden states
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    total += status.st_size
                    if path.parent.name == "shards":
                        self._seen.add((path.name, status.st_mtime_ns))
            self.most, self.captures = max(self.most, total), len(self._seen)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="session")
def cached_twice(answered: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two epochs from the sealed cache, every sample by itself."""
    from deepspec.data.capture import run_capture

    store = tmp_path_factory.mktemp("cached") / "store"
    shutil.copytree(answered, store)
    config = tiny_run(store, ALONE, *ROLLING[1:])
    run_capture(config)
    return run_train(config)


def test_a_rolling_training_ends_bit_for_bit_like_that_from_the_cache_and_keeps_to_its_bytes(fresh: Path, cached_twice: Artifact):
    held = budget_gb(fresh, 4)
    with Watched(fresh) as watched:
        rolling = run_train(tiny_run(fresh, ALONE, *ROLLING, f"resources.rolling_gb={held}"))
    print(watched.most, held * 1e9, watched.captures)
    assert losses(rolling) == losses(cached_twice)
    assert difference(cached_twice, rolling) == 0
    assert 0.3 * held < watched.most / 1e9 <= held
    assert watched.captures > 6, "some shards were captured in both epochs"
    assert not list(fresh.glob("hidden/*/records/*")) + list(fresh.glob("hidden/*/shards/*")) + list(fresh.glob(".staged/*"))
