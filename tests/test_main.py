"""The one door: verbs, exit codes, one paragraph or one JSON line on failure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deepspec import __main__ as door
from deepspec.lineage import artifact_of, stages_of
from tests.conftest import TINY, tiny_run

SETS = [part for override in TINY for part in ("--set", override)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m deepspec ARGUMENTS`."""
    code = 0
    try:
        door.main(lambda: door.app(list(arguments)))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_recipes_are_listed(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert {"dspark-demo", "eagle3-gemma4-12b"} <= set(out.split())
    assert len(out.split()) == 15


def test_status_tells_each_stage_and_where_it_lies(capsys, captured: Path):
    code, out, _ = run(capsys, "status", "demo", "--store", str(captured), *SETS)
    assert code == 0
    for stage in ("demo", "prompts", "answers", "hidden", "train", "evaluate"):
        assert stage in out


def test_lineage_goes_from_the_cache_back_to_the_corpus_by_folder_alone(capsys, captured: Path):
    config = tiny_run(captured)
    code, out, _ = run(capsys, "lineage", str(Path(artifact_of(config, "hidden").url)))
    assert code == 0
    for stage in stages_of(config)[:4]:
        assert artifact_of(config, stage).key.fingerprint in out
    assert "digest" in out


def test_lineage_of_nothing_says_so(capsys, store: Path):
    code, _, err = run(capsys, "lineage", "demo", "--store", str(store), *SETS)
    assert code == 2
    assert "there is no artifact here" in err


def test_verify_finds_nothing_wrong_or_names_it(capsys, captured: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    assert run(capsys, "verify", "demo", "--store", str(store), *SETS)[0] == 0
    frozen = next(store.glob("hidden/*/frozen.safetensors"))
    frozen.write_bytes(frozen.read_bytes()[:-1] + b"x")
    code, _, err = run(capsys, "verify", "demo", "--store", str(store), *SETS)
    assert "frozen.safetensors: damaged" in err
    assert code == 1


def test_a_users_mistake_is_one_paragraph_and_exit_code_2(capsys, tmp_path: Path):
    code, out, err = run(capsys, "prompts", "demmo", "--store", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no recipe 'demmo'")
    assert "Traceback" not in err


def test_a_parent_process_gets_the_error_as_one_json_line(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEEPSPEC_EVENTS", "1")
    (tmp_path / "file").write_text("in the way")
    code, out, _ = run(capsys, "prompts", "demo", "--store", str(tmp_path / "file"))
    event = json.loads(out.splitlines()[-1])
    assert code == 2
    assert (event["event"], event["error"], event["transient"]) == ("error", "StoreError", False)
    assert event["fix"]


def test_a_stage_before_its_time_says_what_to_run_first(capsys, store: Path):
    code, _, err = run(capsys, "hidden", "demo", "--store", str(store), *SETS)
    assert code == 2
    assert "reads 'answers', which is not finished" in err
