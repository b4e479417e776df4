"""What all tests share: a demo run small enough for seconds, and the demo artifact built once a
session.
"""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from deepspec.artifacts.run import Run
from tests.radosgw import Radosgw, ceph_missing

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# before torch: on tensors of a test's size, a second thread costs more than it does
os.environ.setdefault("OMP_NUM_THREADS", "1")
# hundreds of children would each compile the same modules
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Prefect, once a test ran a flow in this process, leaves exit hooks that fail in every forked
# child, which then ends with 1.
os.register_at_fork(after_in_child=threading._threading_atexits.clear)  # type: ignore[attr-defined]

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

# The demo, shrunk until every stage takes a second or two: nothing is learnt, everything runs.
TINY = [
    "demo.conversations=240",
    "demo.vocab_size=512",
    "demo.num_layers=4",
    "demo.hidden_size=32",
    "demo.steps=4",
    "demo.held_out=3",
    "target.layer_ids=[-1, 0, 2]",
    "prompts.limit=24",
    "prompts.shard_rows=4",
    "prompts.held_out=0.1",
    "answers.max_new_tokens=12",
    "draft.num_anchors=4",
    "evaluate.batch_sizes=[1]",
    "train.max_steps=6",
    "train.global_batch=8",
    "train.checkpoint_steps=2",
    "evaluate.max_new_tokens=12",
    "evaluate.temperatures=[0.0, 1.0]",
    "resources.runner.shards_per_task=3",
    "resources.retries.delay_s=0.1",
    "resources.storage.min_free_gb=0",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: what runs last is quick then, and no core waits for it."""
    marks = "slow", "long", "engine"
    slow = Counter(item.path for item in items if any(map(item.get_closest_marker, marks)))
    items.sort(key=lambda item: -slow[item.path])


def tiny_run(store: Path, *overrides: str, recipe: str = "demo"):
    """The tiny demo's configuration in the given store."""
    from deepspec.config.recipes import load_run

    shrunk = [
        override
        for override in TINY
        if not (recipe.startswith("eagle3") and override.startswith("draft."))
    ]
    return load_run(recipe, [*shrunk, *overrides], store=str(store))


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder for all processes of the suite: the first one that asks makes it, and nobody
    writes to it then.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(part := folder.with_suffix(".part"))
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the tiny demo artifact and nothing else; copy it, do not write to it."""
    from deepspec.demo.stage import run_demo

    return made_once(tmp_path_factory, "demo-store", lambda store: run_demo(Run(tiny_run(store))))


@pytest.fixture(scope="session")
def captured(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything that training reads; copy it before training."""
    from deepspec.answers.stage import run_answers
    from deepspec.hidden.stage import run_capture
    from deepspec.prompts.stage import run_prompts

    def make(store: Path) -> None:
        shutil.copytree(demo_store, store)
        for stage in (run_prompts, run_answers, run_capture):
            stage(Run(tiny_run(store)))

    return made_once(tmp_path_factory, "captured-store", make)


@pytest.fixture
def store(demo_store: Path, tmp_path: Path) -> Path:
    """A store of the test's own, the demo stage already done."""
    shutil.copytree(demo_store, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Radosgw]:
    """A real S3 server for the session: `endpoint`, `kill()`, `restart()`, `new_bucket()`,
    `client()`; skips without Ceph.
    """
    if missing := ceph_missing():
        pytest.skip(missing)
    with Radosgw.start(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture
def s3_url(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`s3://<fresh bucket>/store`; the environment of this process and its children leads to
    that server and no other keys.
    """
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    nowhere = {
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in {**radosgw.variables(), **nowhere}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{radosgw.new_bucket()}/store"


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
