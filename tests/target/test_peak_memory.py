"""Memory by arithmetic: what follows from settings alone. `tests/gpu/test_peaks.py` measures the
product's own passes.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec.config.recipes import load_run, recipe_names
from deepspec.model.checkpoint import empty_draft
from deepspec.target.model import Target
from deepspec.target.peak_memory import StageMemory, TargetShape
from tests.target.recipe_targets import TARGETS

RECIPES = [name for name in recipe_names() if not name.endswith("-demo")]


def stages_of(recipe: str, *sets: str, compiled: bool = True) -> StageMemory:
    return StageMemory(
        load_run(recipe, sets, store="none"), TARGETS[recipe.partition("-")[2]], compiled
    )


@pytest.mark.parametrize("name", TARGETS)
def test_weights_keys_and_values_are_those_of_the_model(name: str) -> None:
    settings = dict(TARGETS[name])
    text = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16)
    model.tie_weights()
    # the config as it is written down, and as transformers has it in memory
    for config in (TARGETS[name], text.to_dict()):
        shape = TargetShape.of(config)
        assert shape.num_parameters == pytest.approx(model.num_parameters(), rel=1e-3)
        assert 2 * shape.row_elements(6096) == Target(model, (0,)).row_bytes(6096)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_80_gb_at_its_defaults(recipe: str) -> None:
    """Four of twelve did not; hours into a run, a batch of short answers took more than others."""
    for compiled in (True, False):
        stages = stages_of(recipe, compiled=compiled)
        batch_sizes = stages.config.evaluate.batch_sizes
        peaks = stages.training(), stages.capture(), stages.evaluation(max(batch_sizes))
        assert max(peaks) < 75e9


def test_more_of_anything_takes_no_less_memory() -> None:
    recipe = "dspark-qwen3-4b"
    base = stages_of(recipe)
    assert base.training() < stages_of(recipe, "draft.num_layers=6").training()
    assert base.training() < stages_of(recipe, "resources.memory.batch_slots=40000").training()
    assert base.training() < stages_of(recipe, "train.compute_dtype=float32").training()
    assert base.training() < stages_of(recipe, compiled=False).training()
    assert base.training() > stages_of(recipe, "resources.memory.recompute=true").training()
    assert base.training() < base.training(ranks=8) + 1
    assert base.answers(2) > base.answers(1) > base.answers(0)
    assert base.evaluation(1) > base.answers(0)
    assert stages_of(recipe, "target.dtype=float32").capture() > 1.9 * base.capture()


def test_a_sample_that_is_longer_than_a_batch_is_a_micro_batch_of_its_own() -> None:
    """A budget of 1,024 tokens does not make a sample of 4,096 any smaller."""
    small = stages_of("eagle3-qwen3-4b", "resources.memory.batch_tokens=1024")
    assert small.step_size == (4096, 7 * 4096)
    cut = stages_of(
        "eagle3-qwen3-4b", "resources.memory.batch_tokens=1024", "hidden.max_length=512"
    )
    assert cut.step_size == (1024, 7 * 1024)


def test_online_training_holds_the_target_beside_the_draft() -> None:
    cached = stages_of("dspark-qwen3-4b")
    online = stages_of("dspark-qwen3-4b", "resources.training.source=online")
    assert online.training() == cached.training() + cached.capture()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_deals_out_what_its_stage_deals_out(stage: int) -> None:
    recipe = "dspark-qwen3-8b"
    zero = "train.strategy=deepspeed", f"resources.memory.zero_stage={stage}"
    step = stages_of(recipe).step
    memory = stages_of(recipe, *zero).memory
    trained, ranks = step.num_trained, 8
    own = {1: 2 + 12 / ranks + 4, 2: 2 + 12 / ranks + 4 / ranks, 3: (2 + 12 + 4) / ranks}[stage]
    held = step.held(ranks, memory) - step.frozen
    assert held == pytest.approx(own * trained, rel=1e-6)
    offloaded = memory.model_copy(update={"offload": "optimizer"})
    assert step.held(ranks, offloaded) < step.held(ranks, memory)
    assert step.held(ranks, None) == step.frozen + 16 * trained


def test_parameters_that_train_are_all_but_embedding_and_head() -> None:
    step = stages_of("dspark-gemma4-12b").step
    names = dict(empty_draft(step.spec).named_parameters())
    trained = [
        parameter.numel()
        for name, parameter in names.items()
        if not name.startswith(("embed_tokens", "lm_head"))
    ]
    assert step.num_trained == sum(trained)
