"""The arithmetic of memory against the sizes of all tensors of the product's own passes, at the
recipes' real sizes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepspec.config.recipes import load_run, recipe_names
from deepspec.model.step_memory import StepSize
from deepspec.target.gpu_room import fitting_training
from deepspec.target.peak_memory import ITEM_BYTES, StageMemory
from tests.gpu.harness import device_guard, in_child, missing
from tests.target.recipe_targets import TARGETS

Case = tuple[str, str, dict[str, Any]]

RECIPES = [name for name in recipe_names() if not name.endswith("-demo")]
FAST: list[Case] = [
    ("step", "dspark-qwen3-4b", {"num_tokens": 2048, "num_samples": 1}),
    ("step", "eagle3-qwen3-4b", {"num_tokens": 1024, "num_samples": 1, "recompute": True}),
]
MORE: list[Case] = [
    ("step", "dflash-qwen3-4b", {"num_tokens": 4096, "num_samples": 2, "dtype": "float32"}),
    ("step", "eagle3-qwen3-4b", {"num_tokens": 4096, "num_samples": 2, "dtype": "float32"}),
    ("step", "dspark-gemma4-12b", {"num_tokens": 4096, "num_samples": 4, "recompute": True}),
]
COMPILED: list[Case] = [
    ("step", recipe, {"num_tokens": 4096, "num_samples": 4, "compiled": True})
    for recipe in ("dspark-qwen3-4b", "dflash-gemma4-12b", "eagle3-qwen3-8b")
]
PASSES: list[Case] = [
    ("target_pass", f"dspark-{target}", settings)
    for target in TARGETS
    for settings in (
        {"rows": 1, "num_tokens": 8192},
        {"rows": 4, "num_tokens": 2000, "new_tokens": 4096},
    )
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return device_guard(tmp_path_factory.mktemp("gpu"))


def stages_of(recipe: str, *, compiled: bool = False) -> StageMemory:
    config = load_run(recipe, store="none")
    return StageMemory(config, TARGETS[recipe.partition("-")[2]], compiled)


def at_defaults(recipe: str) -> Case:
    """The largest micro-batch of a recipe: of samples with all their anchors."""
    size, draft = stages_of(recipe).step_size, load_run(recipe, store="none").draft
    num_samples = max(1, size.slots // draft.num_slots(size.tokens))
    return "step", recipe, {"num_tokens": size.tokens, "num_samples": num_samples}


def measured(guard: Path, cases: list[Case]) -> list[dict[str, int]]:
    return in_child("tests.gpu.peaks", {"cases": cases}, guard=guard, timeout_s=1700)


def planned(case: Case, found: dict[str, int]) -> int:
    kind, recipe, settings = case
    stages = stages_of(recipe)
    if kind == "target_pass":
        rows, new_tokens = settings["rows"], settings.get("new_tokens")
        if new_tokens is None:
            return stages.capture()
        return stages.answers(rows)
    item = ITEM_BYTES[settings.get("dtype", "bfloat16")]
    step = replace(
        stages.step,
        item=item,
        frozen_item=item,
        compiled=settings.get("compiled", False),
        recompute=settings.get("recompute", False),
    )
    size = StepSize(settings["num_tokens"], found["slots"])
    return step.held(1, None) + step.micro_batch(size)


def check(guard: Path, cases: list[Case]) -> list[dict[str, int]]:
    """Every case is within 10 % of what is planned."""
    results = measured(guard, cases)
    ratios = {
        json.dumps(case): planned(case, found) / found["peak"]
        for case, found in zip(cases, results, strict=True)
    }
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
    return results


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_takes_the_memory_that_is_planned(guard: Path) -> None:
    check(guard, FAST)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_each_recipe_takes_what_is_planned_and_less_than_80_gb(guard: Path, target: str) -> None:
    """Four of twelve ran out of memory at their defaults."""
    cases = [at_defaults(recipe) for recipe in RECIPES if recipe.endswith(target)]
    assert len(cases) == 3
    assert max(found["peak"] for found in check(guard, cases)) < 75e9


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_is_recommended_for_24_gb_takes_less(guard: Path) -> None:
    cases = []
    for recipe in RECIPES:
        if not (recipe.endswith("qwen3-4b") or recipe.startswith("eagle3")):
            continue
        stages = stages_of(recipe)
        fit = fitting_training(stages, 0.9 * 24e9, ranks=1)
        assert fit is not None
        chosen = stages.with_memory(batch_tokens=fit.batch_tokens, recompute=fit.recompute)
        size, draft = chosen.step_size, chosen.config.draft
        num_samples = max(1, size.slots // draft.num_slots(size.tokens))
        settings = {"num_tokens": size.tokens, "num_samples": num_samples}
        cases.append(("step", recipe, {**settings, "recompute": fit.recompute}))
    assert len(cases) == 6
    assert max(found["peak"] for found in check(guard, cases)) < 22e9


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cases", [MORE, PASSES], ids=["settings", "targets"])
def test_other_passes_take_the_memory_that_is_planned(guard: Path, cases: list[Case]) -> None:
    check(guard, cases)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_compiled_steps_take_less_as_planned(guard: Path) -> None:
    check(guard, COMPILED)
