"""The one door: verbs, exit codes, one paragraph or one JSON line on failure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec import __main__ as door
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.digests import file_digest
from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.storage.urls import open_store
from tests.conftest import REPOSITORY, TINY, tiny_run, write_jsonl

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


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_memory_that_ends_anywhere_is_one_paragraph(capsys, library: str):
    def allocate() -> None:
        if library == "torch":
            torch.empty(1 << 60, dtype=torch.uint8)
        np.empty(1 << 60, dtype=np.uint8)

    with pytest.raises(SystemExit) as ended:
        door.main(allocate)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in error
    assert error.startswith("error: memory ran out: ") and "resources.memory.batch_tokens" in error
    assert "allocate" in error.splitlines()[0].lower()
    with pytest.raises(RuntimeError, match="a bug"):
        door.main(lambda: raising(RuntimeError("a bug")))


def raising(error: Exception) -> None:
    raise error


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
    code, out, _ = run(capsys, "lineage", str(Path(Run(config).artifact("hidden").url)))
    assert code == 0
    for stage in [stage.name for stage in Run(config).stages][:4]:
        assert Run(config).artifact(stage).key.fingerprint in out
    assert "digest" in out


def test_lineage_of_nothing_says_so(capsys, store: Path):
    code, _, err = run(capsys, "lineage", "demo", "--store", str(store), *SETS)
    assert code == 2
    assert "there is no artifact here" in err


def test_the_run_that_made_an_artifact_is_printed_from_the_store_and_makes_the_same(
    capsys, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    moved, config = (
        tmp_path / "elsewhere",
        tiny_run(captured, "train.lr=0.25", "resources.memory.answer_rows=3"),
    )
    shutil.copytree(captured, moved)
    result = Run(config).artifact("evaluate")
    Artifact(open_store(str(moved)), result.key).create(config.model_dump(mode="json"))
    for folder, place in (
        (str(moved / result.folder), "/"),
        (moved.name + "/" + result.folder, tmp_path),
    ):
        monkeypatch.chdir(place)
        code, out, err = run(capsys, "show-config", folder)
        assert (code, err) == (0, "")
        (tmp_path / "that.yaml").write_text(out)
        again = load_run(str(tmp_path / "that.yaml"))
        assert again.store == str(moved) and again.resources.memory.answer_rows == 3
        stages = [stage.name for stage in Run(config).stages]
        assert [Run(again).artifact(stage).key for stage in stages] == [
            Run(config).artifact(stage).key for stage in stages
        ]
    _, out, err = run(
        capsys,
        "show-config",
        str(moved / result.folder),
        "--set",
        "train.lr=0.5",
        "--store",
        "other",
    )
    assert "lr: 0.5" in out and "store: other" in out and err == ""


def test_a_run_that_would_make_something_else_by_now_is_printed_with_a_warning(
    capsys, tmp_path: Path
):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}])
    config = tiny_run(tmp_path / "store", f"prompts.source={{kind: files, paths: [{prompts}]}}")
    artifact = Run(config).artifact("prompts")
    artifact.create(config.model_dump(mode="json"))
    prompts.unlink()
    file_digest.cache_clear()
    code, out, err = run(capsys, "show-config", artifact.url)
    assert (
        code == 0
        and str(prompts) in out
        and "warning: a file that the run reads is not here" in err
    )
    write_jsonl(prompts, [{"prompt": "two"}])
    assert f"not {artifact.key.fingerprint}" in run(capsys, "show-config", artifact.url)[2]


def test_a_run_that_this_version_does_not_know_and_no_artifact_at_all_are_said(
    capsys, tmp_path: Path
):
    artifact = Run(tiny_run(tmp_path)).artifact("prompts")
    code, _, err = run(capsys, "show-config", artifact.url)
    assert code == 2 and "there is no artifact here" in err
    artifact.create({**tiny_run(tmp_path).model_dump(mode="json"), "gone": 1})
    code, out, err = run(capsys, "show-config", artifact.url)
    assert (
        code == 2
        and "gone: there is no such field" in err
        and "print it with deepspec" in err
        and out == ""
    )


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


def test_a_parent_process_gets_the_error_as_one_json_line(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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


@pytest.mark.parametrize(
    ("chosen", "used"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32"}, "max_split_size_mb:32"),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_chose_otherwise(chosen, used):
    """Read back from PyTorch, as a verb finds it."""
    code = (
        "from deepspec.__main__ import main; import importlib; main(lambda: print("
        "importlib.import_module('torch')._C._accelerator_getAllocatorSettings()))"
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**environment, **chosen},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == used
