"""`python -m deepspec plan`, through the door: the table, the JSON, what is refused and how it
is said.
"""

import json
import shutil
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.errors import StoreError
from deepspec.plan.plan import check_cache_fits
from tests.cli.test_main import SETS, run
from tests.conftest import tiny_run, write_jsonl

NO_ROOM = ("--set", "resources.storage.min_free_gb=1000000")


def test_the_demo_is_planned_and_nothing_is_left_in_its_store(capsys, store: Path):
    before = sorted(path for path in store.rglob("*") if path.is_file())
    code, out, _ = run(capsys, "plan", "demo", "--store", str(store), *SETS)
    assert code == 0
    for word in (
        "tokens per sample",
        "S3 requests",
        "measured here (cpu)",
        "resources.training.source=cache",
        "it fits",
    ):
        assert word in out
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before


def test_the_bytes_planned_are_the_bytes_captured(capsys, captured: Path, tmp_path: Path):
    shutil.copytree(captured, tmp_path / "store")
    code, out, _ = run(capsys, "plan", "demo", "--store", str(tmp_path / "store"), "--json", *SETS)
    found = json.loads(out)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store").glob("hidden/*/shards/*"))
    assert code == 0
    assert found["size"]["num_bytes"]["value"] == pytest.approx(on_disk, rel=0.05)
    assert found["size"]["missing_bytes"]["value"] == 0
    assert found["tokens"]["tokens"]["origin"] == "exact"


def test_what_does_not_fit_is_refused_after_the_table_unless_forced(capsys, store: Path):
    arguments = ("plan", "demo", "--store", str(store), *SETS, *NO_ROOM)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "it does NOT fit" in out
    assert err.splitlines()[-3].startswith("error: the hidden states need")
    assert "no hidden.codec fits" in err
    assert "--force" in err
    code, out, err = run(capsys, *arguments, "--force")
    assert (code, "it does NOT fit" in out, "error" in err) == (0, True, False)


def test_a_refused_plan_still_prints_its_json(capsys, store: Path):
    code, out, _ = run(capsys, "plan", "demo", "--store", str(store), "--json", *SETS, *NO_ROOM)
    assert (code, json.loads(out)["fits"]) == (2, False)


def test_the_hours_of_training_can_be_given(capsys, store: Path):
    _, out, _ = run(
        capsys, "plan", "demo", "--store", str(store), "--json", "--train-hours", "2", *SETS
    )
    assert json.loads(out)["training"]["hours"] == {"value": 2.0, "origin": "as given"}


def test_memory_is_planned_for_a_gpu_that_is_not_here(capsys, store: Path):
    arguments = ("plan", "demo", "--store", str(store), *SETS)
    code, out, _ = run(capsys, *arguments, "--gpu", "24")
    assert code == 0
    assert "memory of a GPU" in out and "21.6 GB" in out  # nine tenths of it
    _, out, _ = run(capsys, *arguments, "--gpu", "24", "--json")
    memory = json.loads(out)["memory"]
    assert memory["usable"]["value"] == 21.6e9
    for stage in ("answers", "capture", "training", "evaluation"):
        assert 0 < memory[stage]["value"] < 21.6e9
    assert memory["training_fits"].startswith("set resources.memory.batch_tokens=8192")
    _, out, _ = run(capsys, *arguments, "--json")
    assert json.loads(out)["memory"] is None  # there is no GPU here


def test_a_gpu_that_is_too_small_is_refused_after_the_table_unless_forced(capsys, store: Path):
    arguments = ("plan", "demo", "--store", str(store), *SETS, "--gpu", "0.001")
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out.count("does NOT fit") == 4
    assert "answers needs" in err and "training needs" in err and "--force" in err
    code, _, err = run(capsys, *arguments, "--force")
    assert (code, "error" in err) == (0, False)


def test_a_capture_that_cannot_fit_does_not_start(
    store: Path, captured: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(store)
    check_cache_fits(Run(config))
    monkeypatch.setattr("deepspec.storage.store.Store.free_bytes", lambda self: 200_000.0)
    with pytest.raises(StoreError, match=r"hidden.codec that fits \(.*int8 1"):
        check_cache_fits(Run(config))
    check_cache_fits(Run(tiny_run(store, "resources.checks.space=warn")))
    check_cache_fits(Run(tiny_run(captured)))  # all of it is there: nothing has to fit any more


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("demmo", (), "there is no recipe 'demmo'"),
        (
            "demo",
            ("prompts.source={kind: files, paths: [nowhere.jsonl]}",),
            "the file does not exist",
        ),
        ("demo", ("target.layer_ids=[0, 99]",), "layers [99] cannot be captured"),
        ("dspark-qwen3-4b", ("target.model=/no/such/folder",), "the target cannot be loaded"),
    ],
)
def test_bad_input_is_one_paragraph(
    capsys, store: Path, recipe: str, overrides: tuple[str, ...], said: str
):
    sets = SETS if recipe == "demo" else []
    code, out, err = run(
        capsys,
        "plan",
        recipe,
        "--store",
        str(store),
        *sets,
        *(part for each in overrides for part in ("--set", each)),
    )
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_broken_line_of_the_source_is_named(capsys, store: Path, tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "hello"}])
    path.write_text(path.read_text() + "{broken\n")
    code, _, err = run(
        capsys,
        "plan",
        "demo",
        "--store",
        str(store),
        *SETS,
        "--set",
        f"prompts.source={{kind: files, paths: [{path}]}}",
    )
    assert code == 2
    assert "line 2" in err


def test_a_demo_that_is_not_built_says_what_to_run(capsys, tmp_path: Path):
    code, _, err = run(capsys, "plan", "demo", "--store", str(tmp_path), *SETS)
    assert code == 2
    assert "deepspec demo" in err
