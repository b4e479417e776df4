"""How a training pass is run: compiled, or with layers computed once more in the backward pass."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# what a compiled pass rounds its numbers of tokens and blocks up to: shapes then repeat
FILL_TOKENS, FILL_BLOCKS = 128, 16


class Execution(NamedTuple):
    """Nothing of it changes a result beyond rounding."""

    # what is computed position by position; attention has a compiled kernel of its own
    compile: bool = False
    # a layer's inputs are kept for the backward pass, and nothing of what it computes
    recompute: bool = False

    def positionwise(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What `function` returns; compiled where `compile` is set."""
        return (compiled(function) if self.compile else function)(*inputs)

    def layer(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """What `function` returns; computed again in the backward pass where `recompute` is set."""
        if not (self.recompute and torch.is_grad_enabled()):
            return function(*inputs)
        return cast("Tensor", checkpoint(function, *inputs, use_reentrant=False))


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function: one for all layers, which are an input like any other, and lengths."""
    return torch.compile(function, dynamic=True)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with `x` compute in: its own dtype, or autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
