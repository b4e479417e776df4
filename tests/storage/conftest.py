"""A store on Ceph's gateway for either client, and a proxy before it that injects faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.storage import blocks, remote, retries, s3_client
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store
from tests.faulty import FaultyProxy
from tests.radosgw import Radosgw

CLIENTS = ["obstore", "s3fs"]
PART_BYTES = 5 << 20  # the smallest part that S3 takes


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEEPSPEC_S3_CLIENT", request.param)
    for module, name in (
        (s3_client, "PART_BYTES"),
        (blocks, "BLOCK_BYTES"),
        (remote, "SINGLE_PUT_BYTES"),
    ):
        monkeypatch.setattr(module, name, PART_BYTES)
    return request.param


@pytest.fixture
def store(s3_url: str, client: str, tmp_path: Path) -> Store:
    return open_store(s3_url, scratch=str(tmp_path / "scratch"))


@pytest.fixture
def proxy(radosgw: Radosgw, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(radosgw.port) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.02)  # a scripted fault is over at once
        monkeypatch.setattr(retries, "JITTER_S", 0.02)
        yield between
