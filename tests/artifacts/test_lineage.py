"""Fingerprints cover everything that decides the content, and nothing that does not (trap C4)."""

from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from tests.conftest import tiny_run, write_jsonl

ORDER = ("demo", "prompts", "answers", "hidden", "train", "evaluate")


def fingerprints(*overrides: str, recipe: str = "demo", store: str = "store") -> dict[str, str]:
    config = tiny_run(Path(store), *overrides, recipe=recipe)
    return {
        stage: Run(config).artifact(stage).key.fingerprint
        for stage in [stage.name for stage in Run(config).stages]
    }


@pytest.mark.parametrize(
    ("override", "first_changed"),
    [
        ("demo.seed=1", "demo"),
        ("demo.steps=9", "demo"),
        ("prompts.limit=20", "prompts"),
        ("prompts.seed=1", "prompts"),
        ("prompts.shard_rows=8", "prompts"),
        ("answers.seed=1", "answers"),
        ("answers.sampling.temperature=0.5", "answers"),
        ("answers.max_new_tokens=8", "answers"),
        ("target.thinking=true", "answers"),
        ("target.dtype=bfloat16", "answers"),
        ("target.layer_ids=[0, 1, 2]", "hidden"),
        ("hidden.max_length=99", "hidden"),
        ("target.mask_token_id=2", "train"),
        ("draft.block_size=3", "train"),
        ("draft.markov.rank=8", "train"),
        ("draft.layout=anchor_is_context", "train"),
        ("loss.decay=2.0", "train"),
        ("train.lr=1.0", "train"),
        ("train.seed=1", "train"),
        ("train.window_epochs=2", "train"),
        ("evaluate.seed=1", "evaluate"),
        ("evaluate.max_new_tokens=5", "evaluate"),
    ],
)
def test_a_changed_setting_renames_its_stage_and_those_after_it(override: str, first_changed: str):
    before, after = fingerprints(), fingerprints(override)
    changed = [stage for stage in ORDER if before[stage] != after[stage]]
    assert changed == list(ORDER[ORDER.index(first_changed) :])


@pytest.mark.parametrize(
    "override",
    [
        "resources.memory.answer_rows=3",
        "resources.training.source=online",
        "resources.memory.batch_tokens=77",
        "name=other",
        "train.strategy=deepspeed",
    ],
)
def test_how_the_work_is_done_is_in_no_fingerprint(override: str):
    assert fingerprints(override) == fingerprints()


def test_the_layout_that_was_the_only_one_is_in_no_fingerprint():
    """Drafts that were trained before there was a choice are found."""
    assert fingerprints("draft.layout=anchor_predicts") == fingerprints()
    recipe = Run(tiny_run(Path("store"))).artifact("train").key.recipe
    assert "layout" not in recipe["draft"]


def test_three_drafts_of_one_target_share_one_cache():
    shared = {
        tuple(fingerprints(recipe=f"{algorithm}-demo")[stage] for stage in ORDER[:4])
        for algorithm in ("dspark", "dflash")
    }
    assert len(shared) == 1


def test_a_prompts_file_counts_by_what_it_holds(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}])
    override = f"prompts.source={{kind: files, paths: [{path}]}}"
    before = fingerprints(override)["prompts"]
    from deepspec.artifacts.digests import file_digest

    write_jsonl(path, [{"prompt": "two"}])
    file_digest.cache_clear()
    assert fingerprints(override)["prompts"] != before


def test_a_users_own_prompts_are_read_before_the_demo_trains_its_target(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}])
    own = Run(tiny_run(tmp_path, f"prompts.source={{kind: files, paths: [{path}]}}"))
    assert [stage.name for stage in own.stages][:2] == ["prompts", "demo"]
    assert [stage.name for stage in Run(tiny_run(tmp_path)).stages] == list(ORDER)


def test_an_artifact_folder_is_stage_name_and_fingerprint(tmp_path: Path):
    artifact = Run(tiny_run(tmp_path)).artifact("hidden")
    assert artifact.folder == f"hidden/demo-{artifact.key.fingerprint}"
