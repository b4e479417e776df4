"""Shards that come and go, as a reader sees them: waited for, read, used up under it, captured
again.
"""

import gc
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.cache.format import HiddenSample
from deepspec.cache.reader import HiddenCache
from deepspec.config.run import RunConfig
from deepspec.errors import TransientError
from deepspec.hidden.expected_index import write_expected_index
from deepspec.hidden.online import open_unsealed
from deepspec.hidden.rolling import RollingStates, open_rolling
from deepspec.hidden.rolling_shards import RollingShards
from deepspec.hidden.stage import run_capture
from deepspec.process.events import silent
from deepspec.target.chat import load_chat
from deepspec.target.model import Target
from tests.conftest import tiny_run


@pytest.fixture(params=["local", "memory://rolling"])
def config(captured: Path, tmp_path: Path, request: pytest.FixtureRequest) -> RunConfig:
    """A run with answers and no hidden states, in a folder and in what is none."""
    if request.param == "local":
        shutil.copytree(captured, tmp_path / "store")
        shutil.rmtree(tmp_path / "store" / "hidden")
        return tiny_run(tmp_path / "store")
    config = tiny_run(request.param, f"resources.storage.scratch={tmp_path}")
    store = Run(config).store
    for path in captured.rglob("*"):
        if path.is_file() and not {"hidden", ".staged"} & set(path.parts):
            store.write(str(path.relative_to(captured)), path.read_bytes())
    return config


@pytest.fixture
def source(config: RunConfig) -> Iterator[RollingStates]:
    """As a rank sees it that feeds nothing; all shards are there."""
    write_expected_index(open_unsealed(Run(config)), load_chat(Run(config)), config.hidden)
    run_capture(Run(config), purpose="rolling")
    source = open_rolling(Run(config), share=lambda index: [], is_first=False, report=silent)
    yield source
    source.close()
    Run(config).store.remove(Run(config).artifact("hidden").folder)


def same(first: HiddenSample, second: HiddenSample) -> bool:
    pairs = [(first.input_ids, second.input_ids), (first.context.decode(), second.context.decode())]
    pairs.append((first.last_hidden.decode(), second.last_hidden.decode()))
    return first.sample_id == second.sample_id and all(torch.equal(*pair) for pair in pairs)


def test_a_shard_that_was_used_up_is_waited_for_until_it_is_captured_again(
    captured: Path, config: RunConfig, source: RollingStates
):
    cache = HiddenCache(Run(tiny_run(captured)).artifact("hidden"))
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    streamed = source.stream(iter(order), max_bytes=100_000, threads=3)
    assert all(same(sample, cache[number]) for sample, number in zip(streamed, order, strict=True))
    shelf, number = (
        RollingShards(open_unsealed(Run(config))),
        int(np.flatnonzero(source.index.shard == 2)[1]),
    )
    shelf.open()
    shelf.delete(2)
    left = source.artifact.store.names(source.artifact.path("shards"))
    assert [name[:5] for name in left] == ["00000", "00001", "00003", "00004", "00005"]
    beats: list[int] = []
    source.on_progress(lambda: beats.append(1))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(source.__getitem__, number)
        with pytest.raises(StillWaiting):
            reading.result(timeout=0.5)
        run_capture(Run(config), shards=[2], purpose="rolling")
        assert same(reading.result(timeout=20), cache[number])
        assert beats, (
            "whoever waits for a shard that another rank has captured does not stand still"
        )
        assert shelf.add([2, 9]) == [9]
        shelf.delete(2)
        waiting = pool.submit(source.__getitem__, number)
        source.close()
        with pytest.raises(TransientError, match="training ended while shard 2 was waited for"):
            waiting.result(timeout=20)
    shelf.close()


def test_held_out_samples_are_kept_in_memory_and_the_target_is_not(
    captured: Path, config: RunConfig, source: RollingStates
):
    def targets() -> int:
        return sum(type(each) is Target for each in gc.get_objects())

    gc.collect()
    before, cache = targets(), HiddenCache(Run(tiny_run(captured)).artifact("hidden"))
    first = open_rolling(Run(config), share=lambda index: [3, 11], is_first=True, report=silent)
    assert targets() == before
    source.artifact.store.remove(source.artifact.path("shards"))
    for number in (3, 11):
        assert first[number].sample_id == cache[number].sample_id
        torch.testing.assert_close(
            first[number].context.decode(), cache[number].context.decode(), atol=2e-2, rtol=1e-2
        )


def test_taking_stock_removes_what_a_crash_left_and_what_was_made_from_other_answers(
    config: RunConfig, source: RollingStates
):
    artifact = source.artifact
    records = artifact.records()
    artifact.store.remove(artifact.path("records/00001.json"))  # a deletion that got no further
    artifact.store.remove(artifact.path(records[3].file))  # or a file that was lost
    stale = records[4].model_copy(update={"upstream": "other answers"}).with_digest()
    artifact.store.write(artifact.path("records/00004.json"), stale.model_dump_json().encode())
    shelf = RollingShards(open_unsealed(Run(config)))
    shelf.open()
    shelf.close()
    assert sorted(shelf.sizes) == artifact.record_shards() == [0, 2, 5]
    for folder in ("shards", "rows"):
        assert [name[:5] for name in artifact.store.names(artifact.path(folder))] == [
            "00000",
            "00002",
            "00005",
        ]
