"""AdamW's kernels: the fused one on a GPU, foreach elsewhere, each going on from the other."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepspec.config.draft import TrainConfig
from deepspec.train import strategy as strategies
from deepspec.train.checkpoint_files import optimizer_share
from deepspec.train.deepspeed_setup import derived_config
from deepspec.train.distributed import World
from deepspec.train.strategy import Replicated
from tests.conftest import tiny_run
from tests.model.drafts import make_draft
from tests.train.test_strategy import assert_close, steps, weights

GPU = torch.device("cuda", 0)


def replicated(kernel: str, patch: pytest.MonkeyPatch) -> Replicated:
    """On the CPU, which has both kernels."""
    with patch.context() as patched:
        patched.setattr(strategies, "adamw_kernel", lambda _: {kernel: True})
        settings = TrainConfig(compute_dtype="float32", weight_decay=0.1)
        return Replicated(make_draft(), settings, World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(("first", "second"), [("foreach", "fused"), ("fused", "foreach")])
def test_a_training_goes_on_from_the_other_kernels_state(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
):
    straight, before = (replicated(first, monkeypatch) for _ in range(2))
    steps(straight, range(6))
    steps(before, range(3))
    saved = optimizer_share(before)
    after = replicated(second, monkeypatch)
    after.draft.load_state_dict(before.draft.state_dict())
    for full_name, tensor in saved.items():
        name, _, key = full_name.rpartition(":")
        after.restore(name, key, tensor.clone())
    steps(after, range(3, 6))
    assert_close(weights(straight), weights(after), within=1e-5)
    counts = {float(tensor) for name, tensor in optimizer_share(after).items() if "step" in name}
    assert counts == {6.0}


def test_on_a_gpu_the_step_is_fused_and_counted_there():
    """Tensors without memory that report to be on a GPU; elsewhere the state of a fused step
    raises, and that of any other one is waited for.
    """
    with FakeTensorMode():
        draft = nn.Module()
        draft.weight = nn.Parameter(torch.empty(4, device="cuda"))
        trained = Replicated(draft, TrainConfig(), World(0, 1, GPU))
        for name, parameter in trained.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                trained.restore(name, key, torch.empty(parameter.shape))
            trained.restore(name, "step", torch.empty(()))
            parameter.grad = torch.empty_like(parameter)
        trained.optimizer.step()
        state = trained.optimizer.state
        assert {tensor.device for values in state.values() for tensor in values.values()} == {GPU}
        assert trained.optimizer.defaults["fused"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_steps_fused_on_a_gpu_too(tmp_path: Path, device: str):
    config = tiny_run(tmp_path, "train.strategy=deepspeed")
    derived = derived_config(config, hidden_size=8, num_parameters=100, device=torch.device(device))
    assert derived["optimizer"]["params"].get("fused", False) is (device == "cuda")
