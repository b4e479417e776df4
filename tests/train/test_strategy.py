"""Both strategies do the same to a draft, and each goes on from what the other saved; one
process, real DeepSpeed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepspec.artifacts.run import Run
from deepspec.config.draft import LossConfig, TrainConfig
from deepspec.train.distributed import World
from deepspec.train.strategy import Replicated, Strategy, learning_rate
from deepspec.train.zero import Zero
from tests.conftest import tiny_run
from tests.model.drafts import CONFIGS, make_batch, make_draft

ALONE = World(0, 1, torch.device("cpu"))
DDP = ["train.strategy=ddp"]
ZERO = {
    stage: ["train.strategy=deepspeed", f"resources.memory.zero_stage={stage}"]
    for stage in (1, 2, 3)
}
BFLOAT16 = "train.compute_dtype=bfloat16"
SETTINGS = TrainConfig(lr=1.0, warmup=0.1)


@pytest.fixture(autouse=True)
def rank_of_one(monkeypatch: pytest.MonkeyPatch):
    """What DeepSpeed finds in the environment is set by the code, and must not be left to the
    tests that follow.
    """
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def strategy_of(store: Path, *overrides: str, draft: Any = None) -> Strategy:
    config = tiny_run(store, *overrides)
    draft = make_draft() if draft is None else draft
    if config.train.strategy == "ddp":
        return Replicated(draft, config.train, ALONE)
    return Zero(
        draft, config, ALONE, filler=make_batch((9,)), artifact=Run(config).artifact("train")
    )


def steps(strategy: Strategy, numbers: range) -> list[float]:
    """Optimizer steps of two micro-batches each, and one that is only kept up with; the norms."""
    norms = []
    for number in numbers:
        outputs = [
            strategy.backward(make_batch(lengths, seed=number)) for lengths in [(14, 9), (11,)]
        ]
        if not isinstance(strategy, Replicated):
            strategy.backward(None)
        norms.append(
            strategy.apply(
                lr=1e-2, denominator=float(sum(output.denominator for output in outputs))
            )
        )
    return norms


def weights(strategy: Strategy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in strategy.whole().state_dict().items()}


def assert_close(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], *, within: float
) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == torch.float32
        assert (tensor - second[name]).norm() <= within * tensor.norm().clamp_min(1e-12), name


# Where parameters are dealt out, too, each kind of draft is met layer by layer; below that they are
# one flat vector to DeepSpeed.
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("rnn", 1),
        ("rnn", 2),
        ("eagle3", 2),
        *((kind, 3) for kind in ("rnn", "dflash", "confidence_alone", "eagle3")),
    ],
)
def test_a_stage_does_to_every_kind_of_draft_what_ddp_does(tmp_path: Path, kind: str, stage: int):
    plain = strategy_of(tmp_path, *DDP, draft=make_draft(CONFIGS[kind], target="gemma4"))
    zero = strategy_of(tmp_path, *ZERO[stage], draft=make_draft(CONFIGS[kind], target="gemma4"))
    assert steps(zero, range(4)) == pytest.approx(steps(plain, range(4)), rel=1e-4)
    assert_close(weights(plain), weights(zero), within=1e-4)


def test_a_head_that_is_in_no_loss_decays_alike(tmp_path: Path):
    drafts = [make_draft(), make_draft()]
    for draft in drafts:
        draft.configure_loss(LossConfig(confidence=0.0))
    plain, zero = (
        strategy_of(tmp_path, "train.weight_decay=0.5", *kind, draft=draft)
        for kind, draft in zip((DDP, ZERO[2]), drafts, strict=True)
    )
    steps(plain, range(4))
    steps(zero, range(4))
    assert_close(weights(plain), weights(zero), within=1e-4)


def test_a_micro_batch_with_nothing_to_learn_from_runs_the_same_layers_and_adds_nothing(
    tmp_path: Path,
):
    """Under stage 3 another rank would wait for ever for the layers that this one left out."""
    strategy = strategy_of(tmp_path, *ZERO[3])
    names = []
    for module in strategy.module.modules():  # type: ignore[attr-defined]
        module.register_forward_hook(lambda module, *_: names.append(type(module).__name__))
    batch = make_batch()
    strategy.backward(batch)
    told, names[:] = names.copy(), []
    output = strategy.backward(batch._replace(loss_mask=torch.zeros_like(batch.loss_mask)))
    assert names == told
    assert (float(output.numerator), float(output.denominator), output.metrics) == (0.0, 0.0, {})


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_what_is_kept_in_host_memory_trains_alike(tmp_path: Path, offload: str):
    plain, zero = (
        strategy_of(tmp_path, *DDP),
        strategy_of(tmp_path, *ZERO[3], f"resources.memory.offload={offload}"),
    )
    assert steps(zero, range(4)) == pytest.approx(steps(plain, range(4)), rel=1e-4)
    assert_close(weights(plain), weights(zero), within=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bfloat16_weights_are_masters_and_nothing_frozen_is_rounded(tmp_path: Path, stage: int):
    plain, zero = (
        strategy_of(tmp_path, BFLOAT16, *DDP),
        strategy_of(tmp_path, BFLOAT16, *ZERO[stage]),
    )
    assert_close(weights(plain), weights(zero), within=0.0)
    assert steps(zero, range(4)) == pytest.approx(steps(plain, range(4)), rel=0.1)
    assert_close(weights(plain), weights(zero), within=0.1)
    after, before = weights(zero), make_draft().state_dict()
    assert all(
        torch.equal(after[name], before[name]) for name in ("embed_tokens.weight", "lm_head.weight")
    )


@pytest.mark.parametrize(
    "overrides",
    [DDP, *([dtype, *ZERO[stage]] for stage in (1, 2, 3) for dtype in (BFLOAT16, "train.clip=1"))],
)
def test_a_step_whose_gradient_is_not_finite_changes_nothing(tmp_path: Path, overrides: list[str]):
    strategy = strategy_of(tmp_path, *overrides)
    steps(strategy, range(2))
    before = weights(strategy)
    batch = make_batch()
    strategy.backward(batch._replace(context=batch.context * float("inf")))
    assert not torch.isfinite(torch.tensor(strategy.apply(lr=1e-2, denominator=3.0)))
    assert_close(before, weights(strategy), within=0.0)


def test_the_configuration_is_kept_in_the_artifact(tmp_path: Path):
    strategy_of(tmp_path, *ZERO[1])
    artifact = Run(tiny_run(tmp_path)).artifact("train")
    kept = json.loads(artifact.store.read(artifact.path("deepspeed.json")))
    assert kept["zero_optimization"]["stage"] == 1


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = [learning_rate(step, total=100, settings=SETTINGS) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5, abs=1e-6)
    assert 0 < rates[99] < 0.001


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, total=10, settings=TrainConfig(lr=2.0, warmup=0)) == 2.0


def one_weight(values: list[float], *, clip: float) -> tuple[nn.Parameter, Replicated]:
    draft = nn.Module()
    draft.weight = nn.Parameter(torch.tensor(values))
    return draft.weight, Replicated(draft, SETTINGS.model_copy(update={"clip": clip}), ALONE)


def test_gradients_are_divided_by_the_denominator_before_clipping():
    weight, strategy = one_weight([1.0, 1.0], clip=100.0)
    weight.grad = torch.tensor([6.0, 8.0])
    assert strategy.apply(lr=0.1, denominator=2.0) == pytest.approx(5.0)
    assert weight.grad is None


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    weight, strategy = one_weight([1.0], clip=1.0)
    weight.grad = torch.tensor([float("nan")])
    strategy.apply(lr=0.1, denominator=1.0)
    assert weight.item() == 1.0
