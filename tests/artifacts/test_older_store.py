"""A store that version 0.1.0 sealed before the library was rebuilt is read as it is.

`older_store.tar.xz` holds the tiny demo of that version: an artifact of each stage, less the
checkpoints.
"""

import tarfile
from pathlib import Path

import pytest

from deepspec.artifacts.lineage import lineage_lines
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import results, stage_status
from deepspec.artifacts.verify import verify_artifact
from deepspec.cache.damage import locate_damage
from deepspec.cache.reader import HiddenCache
from deepspec.evaluate.results import read_rows
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run

ARCHIVE = Path(__file__).with_name("older_store.tar.xz")
DIGESTS = {
    "demo": "d03849f40cdcca093d6a5d482eefe1eb",
    "prompts": "259e2d74a03a3d8f2d30ca176a8079d3",
    "answers": "13834aeb743395e4a1204dd603d88104",
    "hidden": "733ae419ba3c0b9a797d234aead93590",
    "train": "faa431c627d630ba582efd1590ce9930",
    "evaluate": "fc5f04c07febc5cef2488d21a0f4ce06",
}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "older"


@pytest.mark.parametrize("stage", DIGESTS)
def test_every_stage_is_already_done_and_whole(older: Path, stage: str):
    run = Run(tiny_run(older))
    assert stage_status(run, stage).sealed
    manifest = run.artifact(stage).manifest()
    assert manifest is not None and manifest.digest == DIGESTS[stage]
    locate = locate_damage if stage == "hidden" else None
    assert list(verify_artifact(run.artifact(stage), locate, num_threads=1)) == []


def test_what_it_holds_is_read(older: Path):
    run = Run(tiny_run(older))
    cache = HiddenCache(run.artifact("hidden"))
    assert len(cache[0].input_ids) > 0
    cache.close()
    summary, rows = results(run), read_rows(run.artifact("evaluate"))
    assert sum(found.prompts for found in summary.benchmarks) == len(rows)
    assert len(list(lineage_lines(run.artifact("evaluate")))) >= 6


def test_prompts_made_again_have_the_same_digest(older: Path):
    run = Run(tiny_run(older))
    run.store.remove(run.artifact("prompts").folder)
    manifest = run_prompts(run).manifest()
    assert manifest is not None and manifest.digest == DIGESTS["prompts"]
