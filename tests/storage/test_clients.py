"""The clients of a process and of its children: which one, and with whose keys."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from deepspec.storage.store import Store
from deepspec.storage.urls import open_store
from tests.conftest import REPOSITORY
from tests.radosgw import ACCESS_KEY, REGION, SECRET_KEY, Radosgw


def read_in_child(store: Store, results) -> None:
    results.put(bytes(store.read_range("data", 2, 6)))


class Bytes:
    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> int:
        return self.store.read_range("data", number, number + 1)[0]


def children_read(url: str, method: str) -> None:
    """In a process of its own: what else a test process has loaded decides whether its forks
    end well.
    """
    from torch.utils.data import DataLoader

    store = open_store(url)
    assert bytes(store.read_range("data", 2, 6)) == bytes(range(2, 6))
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=read_in_child, args=(store, results))
    child.start()
    assert results.get(timeout=60) == bytes(range(2, 6))
    child.join(20)
    assert child.exitcode == 0
    loader = DataLoader(
        Bytes(store), batch_size=1, num_workers=2, timeout=60, multiprocessing_context=method
    )
    assert [int(batch[0]) for batch in loader] == list(range(20))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_and_loader_workers_read_from_a_store_that_the_parent_made_and_used(
    method: str, store: Store
):
    """obstore's threads do not survive a fork, even a new client hangs there: a forked child
    reads through s3fs.
    """
    store.write("data", bytes(range(20)))
    code = (
        "from tests.storage.test_clients import children_read; "
        f"children_read({store.url!r}, {method!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120)


def test_nothing_but_the_standard_chain_is_asked_for_keys(
    s3_url: str, client: str, radosgw: Radosgw, monkeypatch, tmp_path: Path
):
    """A profile in ~/.aws is enough, for both clients."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name)
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}")
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = {REGION}\nendpoint_url = {radosgw.endpoint}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_store(s3_url, scratch=str(tmp_path))
    store.check_writable()
    store.write("x", b"y")
    assert store.read("x") == b"y"
