"""The target's states that the slots of a batch are compared with, each of them once.

N slots, U distinct places of the packed row, T tokens, D hidden size.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class TargetPlaces(NamedTuple):
    """Where in a packed row the states are that slots are compared with, found on the host."""

    distinct: Tensor  # [U] long, each place once, ascending
    of_slot: Tensor  # [N] long, which of them a slot is compared with
    order: Tensor  # [N] long, the slots, those of one place side by side
    in_order: np.ndarray  # [N] long, `of_slot` in that order; the host cuts chunks by it

    @classmethod
    def of(cls, places: Tensor) -> "TargetPlaces":
        """Those of slots whose places [N] long the host has."""
        distinct, of_slot = torch.unique(places, return_inverse=True)
        order = of_slot.argsort(stable=True)
        return cls(distinct, of_slot, order, of_slot[order].numpy())


class Targets(NamedTuple):
    """The target's final states, each once, and which of them a slot is compared with."""

    states: Tensor  # [U, D]
    places: TargetPlaces

    @classmethod
    def gathered(cls, hidden: Tensor, places: TargetPlaces) -> "Targets":
        """Those of `hidden` [T, D], the states of a packed row."""
        return cls(hidden[places.distinct], places)
