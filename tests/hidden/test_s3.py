"""The cache on a real S3 server: the same bytes as on a disk, written and read through outages,
with local copies.
"""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from deepspec.artifacts.run import Run
from deepspec.artifacts.verify import verify_artifact
from deepspec.cache.damage import locate_damage
from deepspec.cache.reader import HiddenCache
from deepspec.hidden import stage as capture
from deepspec.hidden.stage import run_capture
from deepspec.train.loop import run_train
from tests.cache.samples import same
from tests.cache.test_reader import AsDataset
from tests.conftest import tiny_run
from tests.radosgw import Radosgw


def upload(local: Path, url: str, *overrides: str) -> None:
    """Everything before the hidden states, from a local store into the bucket."""
    from deepspec.storage.urls import open_store

    remote = open_store(url)
    for stage in ("demo", "prompts", "answers"):
        for path in sorted((local / stage).rglob("*")):
            if path.is_file():
                remote.write(str(path.relative_to(local)), path.read_bytes())


@pytest.fixture(scope="module")
def in_bucket(radosgw: Radosgw, captured: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run whose hidden states are in a bucket; for tests that read. The environment leads
    there while they run.
    """
    scratch = tmp_path_factory.mktemp("scratch")
    with radosgw.environment():
        url = f"s3://{radosgw.new_bucket()}/store"
        upload(captured, url)
        config = tiny_run(url, f"resources.storage.scratch={scratch}")  # type: ignore[arg-type]
        run_capture(Run(config))
        yield config


@pytest.fixture
def remote(s3_url: str, captured: Path, tmp_path: Path):
    """A run whose store is a bucket, answers done."""
    upload(captured, s3_url)
    return tiny_run(s3_url, f"resources.storage.scratch={tmp_path / 'scratch'}")


@pytest.mark.long
def test_the_cache_in_a_bucket_is_the_one_on_a_disk_through_outages_and_verified(
    remote, captured: Path, radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch
):
    """The server is killed while the third shard is made and comes back; nobody is told."""
    made = iter(range(100))
    original = capture.ShardCapture.shard

    def interrupted(self, work, local):
        if next(made) == 2:
            radosgw.kill()
            threading.Timer(3.0, radosgw.restart).start()
        return original(self, work, local)

    monkeypatch.setattr(capture.ShardCapture, "shard", interrupted)
    sealed, on_disk = (
        run_capture(Run(remote)).manifest(),
        Run(tiny_run(captured)).artifact("hidden").manifest(),
    )
    assert sealed is not None
    assert on_disk is not None
    assert sealed.digest == on_disk.digest
    assert list(verify_artifact(Run(remote).artifact("hidden"), locate_damage, num_threads=1)) == []
    assert not list((Path(remote.resources.storage.scratch) / "staged").iterdir())


def test_a_flipped_bit_in_the_bucket_is_named_and_its_shard_captured_again(remote):
    artifact = run_capture(Run(remote))
    before, record = artifact.manifest(), artifact.record(3)
    assert before is not None
    assert record is not None
    data = bytearray(artifact.store.read(artifact.path(record.file)))
    data[len(data) // 2] ^= 4
    artifact.store.write(artifact.path(record.file), bytes(data))
    (problem,) = verify_artifact(Run(remote).artifact("hidden"), locate_damage, num_threads=1)
    assert "shard 3" in problem
    assert "column context" in problem
    after = run_capture(Run(remote)).manifest()
    assert after is not None
    assert after.digest == before.digest


def test_reading_survives_an_outage_and_the_second_pass_asks_the_server_for_nothing(
    in_bucket, captured: Path, radosgw: Radosgw
):
    local = HiddenCache(Run(tiny_run(captured)).artifact("hidden"))
    cache = HiddenCache(Run(in_bucket).artifact("hidden"), cache_gb=1.0)
    numbers = list(range(len(cache)))
    for number, sample in zip(
        numbers, cache.stream(numbers, max_bytes=200_000, threads=4), strict=True
    ):
        if number == 3:
            radosgw.kill()
            threading.Timer(2.0, radosgw.restart).start()
        assert same(sample, local[number])
    radosgw.kill()
    try:
        for number, sample in zip(
            numbers, cache.stream(numbers, max_bytes=200_000, threads=4), strict=True
        ):
            assert same(sample, local[number])
    finally:
        radosgw.restart()


def test_forked_workers_read_a_bucket_that_their_parent_has_read(in_bucket, captured: Path):
    """Trap C9: an S3 client does not survive a fork; s3fs raises and obstore hangs."""
    local, cache = (
        HiddenCache(Run(tiny_run(captured)).artifact("hidden")),
        HiddenCache(Run(in_bucket).artifact("hidden")),
    )
    assert same(cache[0], local[0])
    loader = DataLoader(
        AsDataset(cache), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for number, context in enumerate(loader):
        assert torch.equal(context, local[number].context.decode())


def test_training_from_a_bucket_ends_where_training_from_a_disk_does(
    in_bucket, captured: Path, tmp_path: Path
):
    from safetensors.torch import load_file

    store = tmp_path / "store"
    shutil.copytree(captured, store)
    on_disk, in_bucket = run_train(Run(tiny_run(store))), run_train(Run(in_bucket))
    first, second = (
        load_file(artifact.store.fetch(artifact.path("draft/model.safetensors")))
        for artifact in (on_disk, in_bucket)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_key_is_in_anything_that_was_written(
    remote, radosgw: Radosgw, caplog: pytest.LogCaptureFixture
):
    artifact = run_capture(Run(remote))
    secrets = [value.encode() for name, value in radosgw.variables().items() if "KEY" in name]
    assert secrets
    for name in (
        "artifact.json",
        "manifest.json",
        "records.arrow",
        "records/00000.json",
        "schema.arrow",
    ):
        assert not any(secret in artifact.store.read(artifact.path(name)) for secret in secrets), (
            name
        )
    assert not any(secret.decode() in caplog.text for secret in secrets)
