"""The schedule, and what one optimizer step does with summed gradients."""

import pytest
import torch
from torch import nn

from deepspec.config.draft import TrainConfig
from deepspec.train.ddp import Replicated
from deepspec.train.distributed import World
from deepspec.train.optimizer import learning_rate

SETTINGS = TrainConfig(lr=1.0, warmup=0.1)


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
    alone = World(0, 1, torch.device("cpu"))
    return draft.weight, Replicated(draft, SETTINGS.model_copy(update={"clip": clip}), alone)


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
