"""What is saved of a draft and its optimizer, and resumed from by either strategy."""

from pathlib import Path

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.errors import DamagedData
from deepspec.train.checkpoint_files import (
    CheckpointRecord,
    optimizer_share,
    resume_draft,
    resume_optimizer,
    save_checkpoint,
)
from deepspec.train.distributed import World
from tests.conftest import tiny_run
from tests.model.drafts import make_draft
from tests.train.test_strategy import (
    BFLOAT16,
    DDP,
    ZERO,
    assert_close,
    rank_of_one,
    steps,
    strategy_of,
    weights,
)

__all__ = ["rank_of_one"]  # a fixture for every test here


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
    save_checkpoint(artifact, saved, draft=saved.whole(), record=CheckpointRecord(step=3))
    draft = make_draft(seed=5)
    record = resume_draft(artifact, draft, {})
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
    shares = []
    for rank in range(3):
        strategy.world = World(rank, 3, torch.device("cpu"))
        shares.append(optimizer_share(strategy))
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
    save_checkpoint(artifact, saved, draft=saved.whole(), record=CheckpointRecord(step=2))
    draft = make_draft(seed=5)
    record = resume_draft(artifact, draft, {})
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
