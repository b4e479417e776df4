"""Training from all three sources: the same samples in the same order, the same losses, the
same draft.
"""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import lineage_lines
from deepspec.artifacts.missing import require_sealed
from deepspec.artifacts.records import index_file
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch, StoreError, TransientError
from deepspec.hidden import rolling_workers
from deepspec.hidden.expected_index import read_expected_index, unrendered, write_expected_index
from deepspec.hidden.metadata import read_layout
from deepspec.hidden.online import OnlineStates, open_online, open_unsealed
from deepspec.hidden.rolling_shards import RollingShards, shard_bytes
from deepspec.process.events import silent
from deepspec.process.launch import RunRequest
from deepspec.target.chat import load_chat
from deepspec.train import loop
from deepspec.train.checkpoint_files import checkpoint_records
from deepspec.train.launcher import launch_ranks
from deepspec.train.loop import run_train
from tests.conftest import REPOSITORY, TINY, tiny_run
from tests.train.test_loop import assert_close, weights

# every sample by itself, in capture and in training: then the arithmetic is the same to the last
# bit
ALONE = "resources.memory.batch_tokens=1"


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
    return [
        line[name]
        for line in map(json.loads, lines)
        for name in ("loss", "held_out_acceptance_length")
        if name in line
    ]


def difference(first: Artifact, second: Artifact) -> float:
    """The largest relative difference of a trained tensor."""
    one, other = weights(first), weights(second)
    return max(
        float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-12)) for name in one
    )


@pytest.mark.parametrize(
    "setting",
    [
        [],
        [
            "hidden.last_hidden=none",
            "draft.algorithm=dflash",
            "draft.markov=null",
            "draft.confidence=null",
            "loss.ce=1",
            "loss.tv=0",
        ],
    ],
)
def test_the_planned_index_is_that_of_the_sealed_cache(
    captured: Path, fresh: Path, setting: list[str]
):
    from deepspec.hidden.stage import run_capture

    config = tiny_run(fresh, *setting)
    stage = open_unsealed(Run(config))
    write_expected_index(stage, load_chat(Run(config)), config.hidden, shards=[3, 1])
    made = {
        name: (fresh / stage.artifact.folder / "planned" / name).stat().st_mtime_ns
        for name in stage.artifact.store.names(stage.artifact.path("planned"))
    }
    assert len(made) == 2
    write_expected_index(stage, load_chat(Run(config)), config.hidden)
    planned = read_expected_index(stage)
    index = HiddenCache(run_capture(Run(config))).index
    for name in set(ExpectedIndex._fields) - {"answer"}:
        assert getattr(planned, name).tolist() == getattr(index, name).tolist(), name
    assert (
        made.items()
        <= {
            path.name: path.stat().st_mtime_ns
            for path in (fresh / stage.artifact.folder / "planned").iterdir()
        }.items()
    )


def test_many_shards_are_rendered_in_several_processes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(fresh, "resources.training.render_processes=2")
    stage = open_unsealed(Run(config))
    monkeypatch.setattr(rolling_workers, "SHARDS_A_PROCESS", 2)
    rolling_workers.render_in_children(Run(config), range(6))
    assert unrendered(stage.artifact, stage.upstream.records()) == []
    planned = Path(stage.artifact.url) / "planned"
    together = {path.name: path.read_bytes() for path in planned.iterdir()}
    shutil.rmtree(planned)
    write_expected_index(stage, load_chat(Run(config)), config.hidden)
    assert {path.name: path.read_bytes() for path in planned.iterdir()} == together


@pytest.mark.parametrize(
    "codec",
    [
        ["raw"],
        ["lossless"],
        ["int8", "hidden.compression=zstd"],
        ["fp8", "hidden.compression=zstd"],
    ],
)
def test_shards_are_no_larger_than_is_reserved_for_them_and_never_sealed(
    fresh: Path, codec: list[str]
):
    from deepspec.hidden.stage import run_capture

    config = tiny_run(fresh, f"hidden.codec={codec[0]}", *codec[1:])
    artifact = run_capture(Run(config), purpose="rolling")
    reserved = shard_bytes(expected_index_of(config), read_layout(artifact, config.hidden))
    for shard, record in artifact.records().items():
        on_disk = record.num_bytes + artifact.store.size(artifact.path(index_file(record)))
        assert (
            on_disk
            <= reserved[shard]
            <= on_disk + (1 << 17) + (on_disk if codec[0] != "raw" else 0)
        )
    assert len(artifact.records()) == 6 and artifact.manifest() is None


def expected_index_of(config) -> ExpectedIndex:
    stage = open_unsealed(Run(config))
    write_expected_index(stage, load_chat(Run(config)), config.hidden)
    return read_expected_index(stage)


def opened(store: Path, *overrides: str) -> OnlineStates:
    return open_online(Run(tiny_run(store, *overrides)), is_first=True, report=silent)


def test_states_computed_online_are_those_of_the_cache(captured: Path, fresh: Path):
    cache, online = HiddenCache(Run(tiny_run(captured)).artifact("hidden")), opened(fresh)
    order = [7, 0, 11, 3, 3, 1]
    for number, found in zip(
        order, online.stream(iter(order), max_bytes=100_000, threads=2), strict=True
    ):
        wanted = cache[number]
        assert found.sample_id == wanted.sample_id == online[number].sample_id
        assert torch.equal(found.input_ids, wanted.input_ids) and torch.equal(
            found.loss_mask, wanted.loss_mask
        )
        assert torch.equal(found.last_spans, wanted.last_spans)
        torch.testing.assert_close(
            found.context.decode(), wanted.context.decode(), atol=2e-2, rtol=1e-2
        )
        torch.testing.assert_close(
            found.last_hidden.decode(), wanted.last_hidden.decode(), atol=2e-2, rtol=1e-2
        )
        assert found.num_bytes <= online.layout.most_bytes(
            len(found.input_ids), len(found.last_hidden.parts[0])
        )


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_online_training_ends_bit_for_bit_like_that_from_the_cache_where_batches_are_the_same(
    fresh: Path, tmp_path: Path, codec: str
):
    from deepspec.hidden.stage import run_capture

    shutil.copytree(fresh, tmp_path / "cached")
    config = tiny_run(tmp_path / "cached", ALONE, f"hidden.codec={codec}")
    run_capture(Run(config))
    cached = run_train(Run(config))
    online = run_train(
        Run(tiny_run(fresh, ALONE, f"hidden.codec={codec}", "resources.training.source=online"))
    )
    assert losses(online) == losses(cached)
    assert difference(cached, online) == 0
    assert not list(fresh.glob("hidden/*/shards/*"))


def test_a_draft_that_was_trained_online_is_sealed_over_the_answers_and_knows_its_prompts(
    fresh: Path,
):
    """Nothing is left to do, whatever becomes of the cache afterwards."""
    from deepspec.hidden.stage import run_capture

    config = tiny_run(fresh, "resources.training.source=online", "train.max_steps=1")
    with pytest.raises(ArtifactMismatch, match="'train' reads 'hidden', which is not finished"):
        run_train(Run(tiny_run(fresh, "train.max_steps=1")))
    assert (
        stage_status(Run(config), "hidden").in_training,
        stage_status(Run(config), "hidden").missing,
    ) == (True, [])
    assert require_sealed(Run(config), "train") and not stage_status(Run(config), "train").sealed
    draft = run_train(Run(config))
    answers = Run(config).artifact("answers")
    assert (
        draft.manifest().inputs[f"answers/{answers.key.fingerprint}"] == answers.manifest().digest
    )
    said = "\n".join(lineage_lines(draft))
    assert all(
        Run(config).artifact(stage).key.fingerprint in said
        for stage in ("train", "hidden", "answers", "prompts", "demo")
    )
    assert "(made in training)" in said
    for later in (config, tiny_run(fresh, "train.max_steps=1")):
        assert stage_status(Run(later), "train").sealed
    run_capture(Run(config))
    assert stage_status(Run(config), "hidden").sealed and stage_status(Run(config), "train").sealed


def test_online_training_ends_like_that_from_the_cache_but_for_rounding(
    captured: Path, fresh: Path, tmp_path: Path
):
    shutil.copytree(captured, tmp_path / "cached")
    cached, online = (
        run_train(Run(tiny_run(tmp_path / "cached"))),
        run_train(Run(tiny_run(fresh, "resources.training.source=online"))),
    )
    print(difference(cached, online), losses(cached), losses(online))
    assert losses(online) == pytest.approx(losses(cached), rel=1e-3)
    assert difference(cached, online) < 1e-2


# Three windows of two shards each epoch, and a disk that holds two windows and not three.
ROLLING = [
    "resources.training.source=rolling",
    "train.window_shards=2",
    "train.max_steps=null",
    "train.epochs=2",
    "resources.runner.shards_per_task=6",
]


def budget_gb(store: Path, shards: int) -> float:
    """What the largest `shards` shards of the run take at most."""
    config = tiny_run(store)
    online = opened(store)
    sizes = sorted(shard_bytes(online.index, online.layout).values())
    assert config.prompts.shard_rows == 4
    return sum(sizes[-shards:]) / 1e9


class Watched:
    """The bytes of shards, index rows and staged files under a store, looked at all the time."""

    def __init__(self, store: Path) -> None:
        self.store, self.most = store, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            total = 0
            for path in [
                *self.store.glob("hidden/*/shards/*"),
                *self.store.glob("hidden/*/rows/*"),
                *self.store.glob(".staged/*"),
            ]:
                # a checkpoint of this process, no hidden states
                if f"-{os.getpid()}-" in path.name:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
            self.most = max(self.most, total)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="session")
def cached_twice(answered: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two epochs from the sealed cache, every sample by itself."""
    from deepspec.hidden.stage import run_capture

    store = tmp_path_factory.mktemp("cached") / "store"
    shutil.copytree(answered, store)
    config = tiny_run(store, ALONE, *ROLLING[1:])
    run_capture(Run(config))
    return run_train(Run(config))


DYING = """
import glob, os, signal, sys, threading, time

def die():
    staged = f"{store}/.staged/*-{{os.getpid()}}-*"
    while not (glob.glob("{store}/hidden/*/records/*") and glob.glob(staged)):
        time.sleep(0.001)
    open("{mark}", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)

is_lane = "rolling" in sys.orig_argv and "deepspec.process.supervisor" not in sys.orig_argv
if is_lane and not os.path.exists("{mark}"):
    if {late}:
        threading.Thread(target=die, daemon=True).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def dying(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Has capture lanes killed: the first one `late`, with a shard committed and another one
    half written, or each at its start.
    """

    def write(*, late: bool) -> Path:
        mark = tmp_path / "died"
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            DYING.format(store=fresh, mark=mark, late=late)
        )
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(REPOSITORY)]))
        return mark

    return write


@pytest.mark.long
def test_a_rolling_training_ends_bit_for_bit_like_that_from_the_cache_and_keeps_to_its_bytes(
    fresh: Path, cached_twice: Artifact, dying, caplog
):
    """Over two epochs, and though its first capture lane is killed."""
    caplog.set_level("INFO")
    held, mark = budget_gb(fresh, 4), dying(late=True)
    with Watched(fresh) as watched:
        rolling = run_train(
            Run(tiny_run(fresh, ALONE, *ROLLING, f"resources.training.rolling_gb={held}"))
        )
    assert mark.exists()
    assert losses(rolling) == losses(cached_twice)
    assert difference(cached_twice, rolling) == 0
    assert 0.3 * held < watched.most / 1e9 <= held
    assert caplog.text.count("was used up") > 6, "some shards were captured in both epochs"
    assert not [
        path for part in ("records", "shards", "rows") for path in fresh.glob(f"hidden/*/{part}/*")
    ] + list(fresh.glob(".staged/*"))


@pytest.mark.long
def test_a_rolling_training_on_two_ranks_that_was_killed_goes_on_with_what_it_needs(
    fresh: Path, cached_twice: Artifact
):
    sets = (*TINY, ALONE, *ROLLING, f"resources.training.rolling_gb={budget_gb(fresh, 4)}")
    two = RunRequest(
        "demo", (*sets, "resources.training.ranks=2", "resources.devices.type=cpu"), str(fresh)
    )
    artifact = Run(tiny_run(fresh, *sets)).artifact("train")
    with subprocess.Popen(
        two.command("train"), cwd=REPOSITORY, stderr=subprocess.DEVNULL
    ) as training:
        limit = time.monotonic() + 120
        while not checkpoint_records(artifact):
            assert time.monotonic() < limit and training.poll() is None
            time.sleep(0.01)
        family = psutil.Process(training.pid).children(recursive=True)
        training.kill()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    hidden = Path(Run(tiny_run(fresh)).artifact("hidden").url)
    (hidden / "shards" / "00009-0123456789ab.arrow").write_bytes(
        b"what a crash left of a shard that was being deleted"
    )
    with Watched(fresh) as watched:
        run_train(Run(tiny_run(fresh, *sets)))
    assert watched.most / 1e9 <= budget_gb(fresh, 4)
    assert_close(weights(cached_twice), weights(artifact))
    assert not list(hidden.glob("shards/*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_a_training_that_only_lacks_its_seal_captures_nothing_and_one_that_has_it_opens_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strategy: str
):
    """Its one step ends where the epoch's last window does: no shard is near, and a sample
    would be waited for for ever.
    """
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    index = opened(fresh).index
    count = int(((index.held_out == 0) & (index.num_supervised > 1)).sum())
    config = tiny_run(
        fresh,
        *ROLLING,
        f"train.global_batch={count}",
        "train.epochs=1",
        f"train.strategy={strategy}",
    )

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "seal_draft", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_train(Run(config))
    caplog.set_level("INFO")
    assert run_train(Run(config)).manifest() is not None
    assert "capturing" not in caplog.text
    caplog.clear()
    run_train(Run(config))
    assert "target=" not in caplog.text and "capturing" not in caplog.text


def test_a_lane_that_always_dies_fails_the_training_with_its_own_error(fresh: Path, dying):
    dying(late=False)
    with pytest.raises(TransientError, match="hidden was killed by SIGKILL"):
        run_train(
            Run(
                tiny_run(
                    fresh,
                    *ROLLING,
                    "resources.retries.times=1",
                    "resources.retries.delay_s=0",
                    "train.acceptance_samples=0",
                )
            )
        )


def test_a_disk_that_cannot_hold_the_windows_of_one_step_is_refused_before_anything_is_captured(
    fresh: Path,
):
    with pytest.raises(
        StoreError, match=r"rolling_gb holds 100 kB \(train.window_shards 2, prompts.shard_rows 4\)"
    ) as caught:
        run_train(Run(tiny_run(fresh, *ROLLING, "resources.training.rolling_gb=0.0001")))
    enough = float(caught.value.fix.split()[3])
    assert budget_gb(fresh, 3) < enough <= 1.01 * budget_gb(fresh, 5)


def test_two_trainings_never_use_up_the_same_shards(fresh: Path):
    stage = open_unsealed(Run(tiny_run(fresh)))
    first = RollingShards(stage)
    first.open()
    with pytest.raises(StoreError, match="another training uses up the shards"):
        RollingShards(stage).open()
    first.close()


def test_a_sealed_cache_is_read_whatever_the_source(
    captured: Path, fresh: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(captured, tmp_path / "sealed")
    caplog.set_level("INFO")
    run_train(
        Run(tiny_run(tmp_path / "sealed", "resources.training.source=rolling", "train.max_steps=1"))
    )
    assert "the cache is sealed and is read, though source is rolling" in caplog.text
    assert Run(tiny_run(tmp_path / "sealed")).artifact("hidden").manifest() is not None


@pytest.mark.long
def test_online_training_on_two_ranks_ends_where_one_does(
    fresh: Path, tmp_path: Path, captured: Path
):
    shutil.copytree(captured, tmp_path / "cached")
    alone = run_train(Run(tiny_run(tmp_path / "cached", "train.global_batch=6")))
    sets = (
        *TINY,
        "train.global_batch=6",
        "resources.training.source=online",
        "resources.training.ranks=2",
        "resources.devices.type=cpu",
    )
    launch_ranks(RunRequest("demo", sets, str(fresh)), 2, report=silent, stop_s=5)
    assert difference(alone, Run(tiny_run(fresh, "train.global_batch=6")).artifact("train")) < 1e-3
