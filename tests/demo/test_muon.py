"""Muon's step: an orthogonal direction, whatever the gradient's scale."""

import torch
from torch import nn

from deepspec.demo.muon import Muon, orthogonal


def test_singular_values_come_near_one_for_wide_and_tall_matrices():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5 and values.max() < 1.5


def test_a_step_does_not_depend_on_the_gradients_scale():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, 4, generator=generator)
    moved = []
    for scale in (1.0, 1000.0):
        matrix = nn.Parameter(torch.zeros(4, 4))
        matrix.grad = gradient * scale
        Muon([matrix], lr=0.1).step()
        moved.append(matrix.detach().clone())
    assert torch.allclose(moved[0], moved[1], atol=1e-5)
    assert (moved[0] * gradient).sum() < 0, "downhill"


def test_matrices_of_one_shape_move_as_each_would_alone():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 5, generator=generator) for _ in range(2)]
    together = [nn.Parameter(torch.zeros(3, 5)) for _ in range(2)]
    for matrix, gradient in zip(together, gradients, strict=True):
        matrix.grad = gradient
    Muon(together, lr=0.1).step()
    for matrix, gradient in zip(together, gradients, strict=True):
        alone = nn.Parameter(torch.zeros(3, 5))
        alone.grad = gradient
        Muon([alone], lr=0.1).step()
        assert torch.allclose(matrix, alone, atol=1e-6)
