"""What is wrong with a request is said in one paragraph, before the target is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from deepspec import __main__ as door
from deepspec.artifacts.run import Run
from deepspec.hidden import stage as capture
from tests.conftest import TINY, tiny_run
from tests.radosgw import Radosgw

SETS = [part for override in TINY for part in ("--set", override)]


@pytest.fixture(autouse=True)
def the_target_must_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(*_: object, **__: object) -> None:
        pytest.fail("the target was loaded")

    monkeypatch.setattr(capture, "load_target", loading)


@pytest.fixture
def answered(captured: Path, tmp_path: Path) -> Path:
    """A store with answers and no hidden states."""
    shutil.copytree(captured, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "hidden")
    return tmp_path / "store"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        door.main(lambda: door.app(["hidden", "demo", *SETS, *arguments]))
    said = capsys.readouterr()
    assert end.value.code == 2, said.err
    assert "Traceback" not in said.err
    assert "fix:" in said.err
    return said.err


def test_a_store_that_cannot_be_written(capsys, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in refused(capsys, "--store", str(tmp_path / "file" / "store"))


def test_an_artifact_of_another_format_version(capsys, captured: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    path = Path(Run(tiny_run(store)).artifact("hidden").url) / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    assert "the artifact's format is not that of this run (2 there, 1 here)" in refused(
        capsys, "--store", str(store)
    )


def test_an_artifact_that_another_recipe_made(capsys, captured: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    path = Path(Run(tiny_run(store)).artifact("hidden").url) / "artifact.json"
    fields = json.loads(path.read_text())
    fields["recipe"]["hidden"]["max_length"] = 99
    path.write_text(json.dumps(fields))
    assert "recipe" in refused(capsys, "--store", str(store))


def test_a_disk_that_cannot_hold_it_names_what_would_fit(
    capsys, answered: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deepspec.storage.store.Store.free_bytes", lambda store: 200_000.0)
    said = refused(capsys, "--store", str(answered))
    assert "the hidden states need" in said
    assert "int8" in said
    assert "--force" in said


def test_a_codec_that_does_not_exist_and_one_that_makes_no_sense(capsys, answered: Path):
    assert "did you mean 'int8'" in refused(
        capsys, "--store", str(answered), "--set", "hidden.codec=int"
    )
    assert "hidden.compression" in refused(
        capsys, "--store", str(answered), "--set", "hidden.compression=zstd"
    )
    assert "hidden.last_codec" in refused(
        capsys, "--store", str(answered), "--set", "hidden.last_codec=fp8"
    )


def test_a_bucket_that_does_not_exist(capsys, s3_url: str):
    assert "no such bucket" in refused(capsys, "--store", "s3://no-such-bucket-here/store")


def test_wrong_credentials_without_a_word_of_them(
    capsys, s3_url: str, radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    said = refused(capsys, "--store", s3_url)
    assert "refuses these credentials" in said
    assert "not-the-secret" not in said
    assert radosgw.variables()["AWS_ACCESS_KEY_ID"] not in said.replace(s3_url, "")
