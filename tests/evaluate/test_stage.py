"""The evaluate stage on the tiny demo: lossless for every algorithm, resumed unit by unit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import failures
from deepspec.artifacts.status import results, stored_report
from deepspec.errors import ArtifactMismatch, ConfigError, DataError, ShardsFailed
from deepspec.evaluate import calibration, units
from deepspec.evaluate import prompts as benchmarks
from deepspec.evaluate import stage as run
from deepspec.evaluate.prompts import load_benchmarks, make_units
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.stage import load_models, run_evaluate
from deepspec.evaluate.units import Evaluator, Models
from deepspec.export.export import export_draft
from deepspec.hidden.stage import run_capture
from deepspec.report.comparison import compare_results
from deepspec.target.model import Target
from deepspec.train.loop import run_train
from tests.cli.test_main import SETS
from tests.cli.test_main import run as command
from tests.conftest import tiny_run, write_jsonl


@pytest.fixture
def ready(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "ready")
    return tmp_path / "ready"


@pytest.mark.parametrize("recipe", ["dspark-demo", "dflash-demo", "eagle3-demo"])
def test_every_algorithm_goes_from_cache_to_lossless_results(ready: Path, recipe: str):
    # eagle3 cannot read the embedding, layer -1
    config = tiny_run(ready, "target.layer_ids=[0, 1, 2]", recipe=recipe)
    run_capture(Run(config))
    run_train(Run(config))
    rows = read_rows(run_evaluate(Run(config)))
    greedy = [row for row in rows if row["temperature"] == 0]
    assert len(greedy) == 9
    assert all(row["identical"] for row in greedy)
    found = results(Run(config))
    assert found.lossless == (9, 9)
    assert set(found.acceptance_length) == {"macro", "math", "code", "chat"}
    assert 1.0 <= found.acceptance_length["macro"] <= config.draft.block_size + 1
    assert found.speedup > 0


@pytest.mark.slow
def test_the_verb_leaves_a_report_beside_a_real_result_and_results_can_be_compared(
    ready: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_run(ready)
    run_train(Run(config))
    code, out, _ = command(capsys, "evaluate", "demo", "--store", str(ready), *SETS)
    assert code == 0 and set(json.loads(out.splitlines()[-1])) == {
        "acceptance_length",
        "lossless",
        "speedup",
    }
    artifact = Run(config).artifact("evaluate")
    page, text = (
        artifact.store.read(artifact.path(f"report.{ending}")).decode() for ending in ("html", "md")
    )
    assert page.startswith("<!DOCTYPE html>") and stored_report(Run(config)) == text
    for found in (page, text):
        assert all(
            Run(config).artifact(stage).key.fingerprint in found
            for stage in [stage.name for stage in Run(config).stages]
        ), "the whole lineage"
        assert "every answer is token for token that of plain greedy decoding" in found
    macro = results(Run(config)).macro
    assert macro.intervals.acceptance_length is not None
    low, _ = macro.intervals.acceptance_length
    assert f"{macro.acceptance_length:.2f} ({low:.2f}" in text
    compared = compare_results(artifact.url, artifact.url)
    assert (compared.matched, compared.unmatched, compared.settings) == (9 + 9, (0, 0), {})


def test_what_was_evaluated_is_not_evaluated_again(ready: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run(ready)
    run_train(Run(config))
    artifact = run_evaluate(Run(config), shards=[0, 2])
    assert sorted(artifact.records()) == [0, 2]
    assert artifact.manifest() is None
    decoded = []
    original = Evaluator.evaluate
    monkeypatch.setattr(
        Evaluator,
        "evaluate",
        lambda self, unit: decoded.append(unit.number) or original(self, unit),
    )
    run_evaluate(Run(config))
    assert decoded == [1, 3, 4, 5]
    run_evaluate(Run(config))
    assert decoded == [1, 3, 4, 5]


def test_of_two_workers_at_the_same_unit_the_first_one_stands(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    """Seconds are part of a row, so no two evaluations are equal: the second worker's whole
    work was reported as failed.
    """
    config = tiny_run(ready, MATH, "evaluate.temperatures=[0.0]")
    run_train(Run(config))
    original = Evaluator.evaluate

    def overtaken(self, unit):
        monkeypatch.setattr(Evaluator, "evaluate", original)
        run_evaluate(Run(config))
        return original(self, unit)

    monkeypatch.setattr(Evaluator, "evaluate", overtaken)
    artifact = run_evaluate(Run(config))
    assert artifact.manifest() is not None
    assert not failures(artifact)


def test_every_prompt_row_tells_how_it_was_rendered_and_what_was_counted(ready: Path):
    config = tiny_run(
        ready, "evaluate.benchmarks=[{name: demo/math, limit: 2}]", "evaluate.temperatures=[0.0]"
    )
    run_train(Run(config))
    for row in read_rows(run_evaluate(Run(config))):
        assert len(row["prompt_digest"]) == 16
        assert len(row["proposed"]) == len(row["accepted"]) == len(row["committed"])
        assert 1 + sum(row["committed"]) >= row["num_tokens"] == len(row["token_ids"])


MATH = "evaluate.benchmarks=[{name: demo/math}]"


def test_a_larger_batch_changes_no_answer_and_shares_its_seconds(ready: Path):
    config = tiny_run(ready, MATH, "evaluate.batch_sizes=[1, 2]")
    run_train(Run(config))
    rows = read_rows(run_evaluate(Run(config)))
    alone, together = (
        {(row["temperature"], row["prompt"]): row for row in rows if row["batch_size"] == size}
        for size in (1, 2)
    )
    assert len(alone) == len(together) == 6
    for key, row in alone.items():
        assert together[key]["token_ids"] == row["token_ids"]
        assert together[key]["accepted"] == row["accepted"]
    assert {row["group"] for row in alone.values()} == {0, 1, 2}
    assert {(row["group"], row["seconds"]) for key, row in together.items() if key[0] == 0} == {
        (0, together[0.0, 0]["seconds"])
    }
    sizes = [speed.batch_size for speed in results(Run(config)).benchmarks[0].batch_sizes]
    assert sizes == [1, 2]


def test_the_two_ways_take_turns_at_every_batch_size_after_a_warm_up_at_that_size(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    """Above batch size 1 plain decoding always went first, and nothing had been decoded at that
    size before it was timed.
    """
    config = tiny_run(
        ready, MATH, "evaluate.batch_sizes=[1, 2]", "evaluate.temperatures=[0.0, 1.0]"
    )
    run_train(Run(config))
    order: list[tuple[int, str]] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **rest: Any) -> Any:
            order.append((given[-1].batch_size, name))
            return original(*given, **rest)

        return call

    monkeypatch.setattr(benchmarks, "SLICE_BATCHES", 1)
    for name in ("generate", "speculate"):
        monkeypatch.setattr(units, name, noted(name, getattr(units, name)))
    run_evaluate(Run(config))
    for size in (1, 2):
        pairs = [name for batch_size, name in order if batch_size == size]
        assert pairs[:2] == ["generate", "speculate"], "the warm-up"
        first = pairs[2::2]
        assert 0 < first.count("generate") < len(first)
        assert len(first) == {1: 2 * 3, 2: 2 * 2}[size]


def test_calibrated_confidence_is_stored_with_summary_and_draft_and_cuts_later_runs(
    ready: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(calibration, "MIN_TESTED", 3)
    config = tiny_run(ready, MATH, "evaluate.temperatures=[0.0]")
    draft = run_train(Run(config))
    uncut = run_evaluate(Run(config))
    summary = json.loads(uncut.store.read(uncut.path("summary.json")))
    assert {"positions", "temperatures", "thresholds"} <= set(summary["calibration"])
    assert {"full", "scheduled"} <= set(summary["scheduler"]["policies"])
    shipped = json.loads(draft.store.read(draft.path("draft/calibration.json")))
    assert shipped["temperatures"] == summary["calibration"]["temperatures"]
    curve = tmp_path / "curve.json"
    curve.write_text(json.dumps({"tokens": [1, 64], "steps_per_second": [100.0, 10.0]}))
    wanted = {row["prompt"]: row["token_ids"] for row in read_rows(uncut)}
    for cut in (
        ["evaluate.verify=threshold", "evaluate.threshold=0.6"],
        ["evaluate.verify=scheduled", f"resources.devices.speed_curve={curve}"],
    ):
        artifact = run_evaluate(Run(tiny_run(ready, MATH, "evaluate.temperatures=[0.0]", *cut)))
        rows = read_rows(artifact)
        assert {row["prompt"]: row["token_ids"] for row in rows} == wanted, (
            "what is verified changes no answer"
        )
        assert any(length < config.draft.block_size for row in rows for length in row["proposed"])
        assert (
            json.loads(artifact.store.read(artifact.path("policy.json")))["temperatures"]
            == shipped["temperatures"]
        )


@pytest.mark.parametrize("recipe", ["dflash-demo", "eagle3-demo"])
def test_blocks_of_a_draft_without_confidence_cannot_be_cut(tmp_path: Path, recipe: str):
    """Refused before anything runs; it was refused only once the draft was trained."""
    with pytest.raises(ConfigError, match="has no confidence head"):
        tiny_run(tmp_path, "target.layer_ids=[0, 1, 2]", "evaluate.verify=threshold", recipe=recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        "temperatures=[-1]",
        "temperatures=[.nan]",
        "temperatures=[.inf]",
        "temperatures=[0, 0.0]",
        "batch_sizes=[8, 8]",
    ],
)
def test_temperatures_and_batch_sizes_that_cannot_be_are_refused_before_anything_runs(
    tmp_path: Path, wrong: str
):
    """A temperature below 0 ended in a stack trace once the draft was trained; one named twice
    had every prompt counted twice.
    """
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        tiny_run(tmp_path, f"evaluate.{wrong}")


def test_a_speed_curve_that_cannot_be_read_is_refused_before_the_first_prompt(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was first opened when everything had been decoded, or, where too few rounds told
    confidence, never.
    """
    config = tiny_run(ready, MATH, f"resources.devices.speed_curve={tmp_path / 'none.json'}")
    run_train(Run(config))
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: pytest.fail("a prompt was decoded"))
    with pytest.raises(DataError, match="the speed curve cannot be read"):
        run_evaluate(Run(config))


def test_a_batch_that_does_not_fit_is_left_out_with_the_reason(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(ready, MATH, "evaluate.batch_sizes=[1, 2]", "evaluate.temperatures=[0.0]")
    run_train(Run(config))
    original = units.generate

    def too_large(target, prompts, settings, **rest):
        if settings.batch_size == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(target, prompts, settings, **rest)

    monkeypatch.setattr(units, "generate", too_large)
    artifact = run_evaluate(Run(config))
    assert {row["batch_size"] for row in read_rows(artifact)} == {1}
    rejected = [record.rejected for record in artifact.records().values()]
    assert rejected == [0, 3]


def limit_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Once target and draft are loaded, let a pass of more rows run out of memory at its end."""
    original, load = Target.forward, run.load_models

    def limited(self: Target, ids: torch.Tensor, cache: Any = None) -> Any:
        output = original(self, ids, cache)
        if cache is not None and len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return output

    def loaded(of_run: Run) -> Models:
        models = load(of_run)
        monkeypatch.setattr(Target, "forward", limited)
        return models

    monkeypatch.setattr(run, "load_models", loaded)


def test_a_batch_that_runs_out_of_memory_is_decoded_at_a_smaller_size_with_the_same_tokens(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The rows name the size that was measured; the first size's acceptance is that of all."""
    settings = (MATH, "evaluate.temperatures=[0.0, 1.0]", "evaluate.verify=full")
    config = tiny_run(ready, *settings, "evaluate.batch_sizes=[3]")
    run_train(Run(config))
    shutil.copytree(ready, tmp_path / "limited")
    limited = tiny_run(tmp_path / "limited", *settings, "evaluate.batch_sizes=[3]")
    whole = run_evaluate(Run(config))
    limit_rows(monkeypatch, 2)
    halved = run_evaluate(Run(limited))
    assert {row["batch_size"] for row in read_rows(whole)} == {3}
    assert {row["batch_size"] for row in read_rows(halved)} == {1}
    same = ("prompt", "token_ids", "proposed", "accepted", "committed", "identical")
    for row, wanted in zip(read_rows(halved), read_rows(whole), strict=True):
        assert [row[name] for name in same] == [wanted[name] for name in same]
    assert [record.rejected for record in halved.records().values()] == [0, 0]
    assert results(Run(limited)).acceptance_length == results(Run(config)).acceptance_length


def test_a_prompt_that_does_not_fit_by_itself_is_named(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(ready, MATH, "evaluate.batch_sizes=[1]", "evaluate.temperatures=[0.0]")
    run_train(Run(config))
    limit_rows(monkeypatch, 0)
    monkeypatch.setattr(Target, "row_bytes", lambda *_: 2_000_000_000)
    with pytest.raises(
        ShardsFailed, match=r"a prompt of \d+ tokens and its answer of up to 12 do "
    ):
        run_evaluate(Run(config))
    failure = failures(Run(config).artifact("evaluate"))[0]
    assert "need 2.000 GB" in str(failure)


def test_units_are_slices_of_benchmarks_at_each_temperature(ready: Path):
    config = tiny_run(ready)
    made = make_units(config, load_benchmarks(Run(config)))
    assert [(unit.temperature, unit.benchmark) for unit in made] == [
        (t, name) for t in (0.0, 1.0) for name in ("math", "code", "chat")
    ]
    assert [unit.number for unit in made] == list(range(6))


def test_a_limit_takes_a_seeded_choice(ready: Path):
    chosen = [
        load_benchmarks(
            Run(
                tiny_run(
                    ready, "evaluate.benchmarks=[{name: demo/math, limit: 2}]", f"evaluate.seed={s}"
                )
            )
        )
        for s in (0, 0, 3)
    ]
    assert chosen[0] == chosen[1]
    assert all(len(benchmarks[0].prompts) == 2 for benchmarks in chosen)


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"turns": []}], "line 1"), ([{"turns": ["x"]}, {"prompt": "y"}], "line 2"), ([], "empty")],
)
def test_a_benchmark_that_cannot_be_used_is_refused_before_anything_runs(
    ready: Path, tmp_path: Path, rows: list, said: str
):
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.raises(DataError, match=said):
        load_benchmarks(
            Run(tiny_run(ready, f"evaluate.benchmarks=[{{name: demo/math}}, {{name: {path}}}]"))
        )


def test_target_and_draft_hold_embedding_and_lm_head_once(ready: Path):
    """Fault 13: of a draft for Qwen3-8B they are 2.5 GB in bfloat16, beside the target's own."""
    run_train(Run(tiny_run(ready)))
    for dtype in ("float32", "bfloat16"):
        models = load_models(Run(tiny_run(ready, f"evaluate.dtype={dtype}")))
        shared, own = models.target.frozen, models.draft.state_dict()
        assert {name: own[name].data_ptr() for name in shared} == {
            name: tensor.data_ptr() for name, tensor in shared.items()
        }


def test_a_draft_of_another_target_is_refused_before_any_weight_is_read(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(ready)
    run_train(Run(config))
    artifact = Run(config).artifact("train")
    described = json.loads(artifact.store.read(artifact.path("draft/config.json")))
    wrong = {**described, "hidden_size": 64, "num_target_layers": 9}
    artifact.store.write(artifact.path("draft/config.json"), json.dumps(wrong).encode())
    monkeypatch.setattr(run, "load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    with pytest.raises(
        ArtifactMismatch, match="hidden size: draft 64, target 32; layers: draft 9, target 4"
    ):
        run_evaluate(Run(config))


def test_an_export_of_an_evaluated_draft_tells_what_it_was_made_from_and_how_it_did(
    ready: Path, tmp_path: Path
):
    config = tiny_run(
        ready, "evaluate.benchmarks=[{name: demo/math, limit: 1}]", "evaluate.temperatures=[0.0]"
    )
    run_train(Run(config))
    run_evaluate(Run(config))
    train = Run(config).artifact("train")
    export_draft(Path(train.url.removeprefix("file://")), engine="vllm", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    target = Run(config).artifact("demo").fetch_folder("target")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_name_or_path"] == str(
        target
    )
    assert f"vllm serve {target} " in card
    for stage in ("train", "hidden", "answers", "prompts"):
        artifact = Run(config).artifact(stage)
        manifest = artifact.manifest()
        assert manifest is not None
        assert f"{artifact.folder}  (digest {manifest.digest}" in card
    macro = results(Run(config)).macro.acceptance_length
    assert f"at temperature 0.0: tokens per round (bonus included) macro {macro:.2f}" in card
