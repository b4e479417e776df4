"""Both strategies do the same to a draft, and each goes on from what the other saved; one
process, real DeepSpeed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.config.draft import LossConfig
from deepspec.errors import ConfigError, DamagedData
from deepspec.train.checkpoint_files import (
    CheckpointRecord,
    optimizer_share,
    resume_draft,
    resume_optimizer,
    save_checkpoint,
)
from deepspec.train.ddp import Replicated
from deepspec.train.distributed import World
from deepspec.train.parallel import make_strategy
from deepspec.train.strategy import Strategy
from deepspec.train.zero import derived_config
from tests.conftest import REPOSITORY, tiny_run
from tests.model.drafts import CONFIGS, make_batch, make_draft

ALONE = World(0, 1, torch.device("cpu"))
DDP = ["train.strategy=ddp"]
ZERO = {
    stage: ["train.strategy=deepspeed", f"resources.memory.zero_stage={stage}"]
    for stage in (1, 2, 3)
}
BFLOAT16 = "train.compute_dtype=bfloat16"


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
    return make_strategy(
        config, Run(config).artifact("train"), ALONE, draft=draft, filler=lambda: make_batch((9,))
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


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (DDP, DDP),
        (ZERO[1], ZERO[1]),
        ([BFLOAT16, *ZERO[1]], [BFLOAT16, *ZERO[2]]),
        (ZERO[2], DDP),
        (DDP, ZERO[3]),
        (ZERO[3], ZERO[3]),
    ],
)
def test_a_strategy_goes_on_from_what_another_saved(
    tmp_path: Path, first: list[str], then: list[str]
):
    saved, undisturbed = strategy_of(tmp_path, *first), strategy_of(tmp_path, *then)
    steps(saved, range(3))
    artifact = Run(tiny_run(tmp_path)).artifact("train")
    save_checkpoint(artifact, saved, ALONE, draft=saved.whole(), record=CheckpointRecord(step=3))
    draft = make_draft(seed=5)
    record = resume_draft(artifact, draft)
    assert record is not None
    resumed = strategy_of(tmp_path, *then, draft=draft)
    resume_optimizer(artifact, record, resumed)
    steps(resumed, range(3, 6))
    steps(undisturbed, range(6))
    rounding = 0.05 if BFLOAT16 in then else 1e-4
    assert_close(weights(undisturbed), weights(resumed), within=0.0 if first == then else rounding)


def test_the_optimizers_shares_hold_every_parameter_once_and_about_the_same_each(tmp_path: Path):
    strategy = strategy_of(tmp_path, *DDP)
    steps(strategy, range(1))
    shares = [optimizer_share(strategy, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    names = [name for share in shares for name in share]
    assert sorted(names) == sorted(
        f"{name}:{key}" for name in strategy.sizes for key in ("step", "exp_avg", "exp_avg_sq")
    )
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in shares]
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_resumed_and_damage_is_named(s3_url: str, tmp_path: Path):
    config = tiny_run(s3_url, f"resources.storage.scratch={tmp_path / 'scratch'}")  # type: ignore[arg-type]
    artifact, saved = Run(config).artifact("train"), strategy_of(tmp_path, *ZERO[2])
    steps(saved, range(2))
    save_checkpoint(artifact, saved, ALONE, draft=saved.whole(), record=CheckpointRecord(step=2))
    draft = make_draft(seed=5)
    record = resume_draft(artifact, draft)
    assert record is not None
    resumed = strategy_of(tmp_path, *ZERO[2], draft=draft)
    resume_optimizer(artifact, record, resumed)
    steps(saved, range(2, 4))
    steps(resumed, range(2, 4))
    assert_close(weights(saved), weights(resumed), within=0.0)
    artifact.store.write(
        artifact.path("checkpoints/00000002/optimizer-00001-of-00001.safetensors"),
        b"something else",
    )
    with pytest.raises(DamagedData, match=r"optimizer-00001-of-00001\.safetensors is damaged"):
        resume_optimizer(artifact, record, resumed)


def test_the_configuration_follows_from_ours_and_is_shown(tmp_path: Path):
    overrides = [
        "train.lr=0.5",
        "train.weight_decay=0.1",
        "train.clip=0.7",
        BFLOAT16,
        "resources.memory.offload=all",
        *ZERO[3],
    ]
    derived = derived_config(tiny_run(tmp_path, *overrides), 32, num_parameters=1001, device="cuda")
    assert (
        derived["optimizer"]["params"] | {"lr": 0.5, "weight_decay": 0.1, "betas": [0.9, 0.999]}
        == derived["optimizer"]["params"]
    )
    assert derived["gradient_clipping"] == 0.7
    assert derived["bf16"] == {"enabled": True}
    host = {"device": "cpu", "pin_memory": True}
    assert derived["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": host,
        "offload_param": host,
        "stage3_param_persistence_threshold": 32,
        "reduce_bucket_size": 1002,
        "allgather_bucket_size": 1002,
    }
    strategy_of(tmp_path, *ZERO[1])
    artifact = Run(tiny_run(tmp_path)).artifact("train")
    assert (
        json.loads(artifact.store.read(artifact.path("deepspeed.json")))["zero_optimization"][
            "stage"
        ]
        == 1
    )


def test_parameters_are_offloaded_only_where_they_are_dealt_out(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"needs resources\.memory\.zero_stage 3"):
        tiny_run(tmp_path, "resources.memory.offload=all", "resources.memory.zero_stage=2")


def test_deepspeed_is_loaded_for_nobody_else_and_its_absence_is_told_before_anything_is_read(
    captured: Path,
):
    code = """
import sys
from pathlib import Path
from deepspec.artifacts.run import Run
from deepspec.errors import ConfigError
from deepspec.train.loop import run_train
from tests.conftest import tiny_run
assert "deepspeed" not in sys.modules
sys.modules["deepspeed"] = None  # as if it were not installed
try:
    run_train(Run(tiny_run(Path(sys.argv[1]), "train.strategy=deepspeed")))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(captured)],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert "pip install '.[deepspeed]'" in done.stdout
    assert not (captured / "train").exists()
