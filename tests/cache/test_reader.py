"""The hidden-state cache as training reads it."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactKey
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.storage.urls import open_store
from tests.cache.samples import LAYOUT, make_cache, make_sample, same
from tests.conftest import REPOSITORY

KEY = ArtifactKey("hidden", "tiny", "0123456789ab", {}, ())
SAMPLES = [[make_sample(10 * shard + row, 3 + row) for row in range(4)] for shard in range(3)]
FLAT = [sample for shard in SAMPLES for sample in shard]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make_cache(Artifact(open_store(str(tmp_path / "store")), KEY), SAMPLES)


def flip_a_bit(cache: HiddenCache, number: int) -> None:
    """In the stored message of a sample."""
    path = Path(
        cache.artifact.store.path(cache.artifact.path(cache.files[int(cache.index.shard[number])]))
    )
    data = bytearray(path.read_bytes())
    data[int(cache.index.offset[number]) + 300] ^= 1
    path.write_bytes(data)


def test_every_sample_comes_back_by_its_number(artifact: Artifact):
    cache = HiddenCache(artifact)
    assert len(cache) == 12
    assert all(same(cache[number], sample) for number, sample in enumerate(FLAT))


def test_a_stream_keeps_the_order_asked_and_reads_each_sample_once(artifact: Artifact):
    cache, order = HiddenCache(artifact), [7, 0, 11, 3, 3, 1]
    for number, sample in zip(order, cache.stream(order, max_bytes=3000, threads=3), strict=True):
        assert same(sample, FLAT[number])


def test_a_stream_left_early_leaves_no_thread(artifact: Artifact):
    import threading

    def reading() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")}

    before = reading()  # those of another test's stream, which nobody has collected yet
    stream = HiddenCache(artifact).stream(range(12), max_bytes=3000, threads=3)
    next(stream)
    assert reading() - before
    stream.close()
    assert not reading() - before


def test_opening_looks_at_no_shard(artifact: Artifact):
    for record in artifact.records().values():
        Path(artifact.store.path(artifact.path(record.file))).unlink()
    assert len(HiddenCache(artifact)) == 12


def test_a_flipped_bit_is_found_before_decoding_and_names_shard_and_row(artifact: Artifact):
    cache = HiddenCache(artifact)
    flip_a_bit(cache, 6)
    with pytest.raises(DamagedData, match="row 2 of shard 1 is damaged"):
        cache[6]
    assert same(cache[5], FLAT[5])


def test_damage_that_came_after_the_first_read_is_found_when_every_read_is_checked(
    artifact: Artifact,
):
    always = HiddenCache(artifact, check_reads="always")
    assert same(always[6], FLAT[6])
    flip_a_bit(always, 6)
    with pytest.raises(DamagedData, match="row 2 of shard 1"):
        always[6]


def test_a_missing_shard_is_damage_that_names_it(artifact: Artifact):
    cache = HiddenCache(artifact)
    Path(artifact.store.path(artifact.path(cache.files[1]))).unlink()
    with pytest.raises(DamagedData, match="row 0 of shard 1"):
        cache[4]


def test_a_cut_off_shard_is_damage_and_not_a_short_sample(artifact: Artifact):
    cache = HiddenCache(artifact)
    path = Path(artifact.store.path(artifact.path(cache.files[2])))
    os.truncate(path, int(cache.index.offset[11]) + 10)
    with pytest.raises(DamagedData, match="row 3 of shard 2"):
        cache[11]


def test_an_unfinished_cache_is_refused(artifact: Artifact):
    artifact.store.remove(artifact.path("manifest.json"))
    with pytest.raises(ArtifactMismatch, match="not finished"):
        HiddenCache(artifact)


class AsDataset(Dataset[torch.Tensor]):
    def __init__(self, cache: HiddenCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.cache[number].context.decode().clone()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_were_forked_or_spawned_read_what_the_parent_opened(
    artifact: Artifact, method: str
):
    """Trap C9; the parent has read before it forks."""
    cache = HiddenCache(artifact)
    assert same(cache[0], FLAT[0])
    loader = DataLoader(
        AsDataset(cache), batch_size=None, num_workers=2, multiprocessing_context=method
    )
    for number, context in enumerate(loader):
        assert torch.equal(context, FLAT[number].context.decode())


def test_a_pickled_cache_holds_no_data(artifact: Artifact):
    assert len(pickle.dumps(HiddenCache(artifact))) < 1000


def test_opening_and_reading_import_no_pandas(artifact: Artifact):
    """pyarrow's conversions import pandas where it is installed: half a second and 30 MB for
    every rank.
    """
    code = f"""
import sys
from deepspec.artifacts.artifact import Artifact
from deepspec.cache.reader import HiddenCache
from deepspec.artifacts.records import ArtifactKey
from deepspec.storage.urls import open_store
key = ArtifactKey("hidden", "tiny", "0123456789ab", {{}}, ())
cache = HiddenCache(Artifact(open_store({artifact.store.url!r}), key))
cache[3].context.decode()
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_the_samples_stay_good_when_a_buffer_is_used_again(artifact: Artifact):
    """A streamed sample lives in memory that the next ones will use: what was decoded into
    memory of its own stays.
    """
    cache = HiddenCache(artifact)
    kept = [
        sample.context.decode(
            out=torch.empty(len(sample.input_ids), LAYOUT.context.width, dtype=torch.bfloat16)
        )
        for sample in cache.stream(range(12), max_bytes=1, threads=1)
    ]
    assert all(
        torch.equal(context, sample.context.decode())
        for context, sample in zip(kept, FLAT, strict=True)
    )


def test_an_emptied_shard_is_damage_in_a_mapped_cache_too(artifact: Artifact):
    cache = HiddenCache(artifact)
    assert cache.mapped
    Path(artifact.store.path(artifact.path(cache.files[1]))).write_bytes(b"")
    with pytest.raises(DamagedData, match="row 1 of shard 1"):
        cache[5]


def test_a_cache_larger_than_memory_is_read_and_not_mapped(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deepspec.cache.reader.MAPPED_SHARE", 0.0)
    cache = HiddenCache(artifact)
    assert not cache.mapped
    for number, sample in enumerate(cache.stream(range(12), max_bytes=3000, threads=3)):
        assert same(sample, FLAT[number])
