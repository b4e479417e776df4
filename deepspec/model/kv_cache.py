"""Keys and values of attention layers, with rows of different lengths.

Memory is taken as rows grow, or all at once where it must not move; a layer that sees a sliding
window keeps no more than the window.
Taking tokens of a row back is lowering its length: what the row holds after its end is overwritten
by the next write. B rows, n new positions, H key-value heads, E head dimension.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.errors import DeepSpecError
from deepspec.model.host_copy import row_numbers, row_starts

GROWTH = 256  # positions added at a time at least, unless the cache has no room for more
# Positions that a window's slots have room for beyond it: a verified block writes that many at
# once, and those that are rejected must not have overwritten what the next ones see.
SPARE = 32


class Places(NamedTuple):
    """Where new positions of rows are written."""

    rows: Tensor  # [B, 1] long
    slots: Tensor  # [B, n] long

    @classmethod
    def after(cls, starts: Tensor, num_new: int, slots: int) -> "Places":
        """Of the next `num_new` positions of rows of lengths `starts` [B, 1] long."""
        rows, new = (torch.arange(size, device=starts.device) for size in (len(starts), num_new))
        return cls(rows[:, None], (starts + new) % slots)


class LayerCache:
    """Room for `capacity` positions in each row, of which `window` (0: all) are seen at a time.

    Position p is in slot p % slots. Slots are added as rows grow, at the first write too.
    """

    def __init__(self, rows: int, capacity: int, window: int = 0) -> None:
        self.rows, self.capacity, self.window = rows, capacity, window
        self.is_fixed = False  # all memory is taken at the first write, and stays where it is
        # [B, H, slots, E] each
        self.pair: tuple[Tensor, Tensor] | None = None
        # of all rows of a fixed one, once it has dropped some
        self._of_all_rows: tuple[Tensor, Tensor] | None = None

    @property
    def slots(self) -> int:
        """Positions of each row that memory was taken for so far."""
        return 0 if self.pair is None else self.pair[0].shape[2]

    @property
    def most_slots(self) -> int:
        """Positions of each row that memory is taken for at most.

        Only a write of more than `SPARE` positions after a window's worth of them takes more.
        """
        return min(self.capacity, self.window + SPARE) if self.window else self.capacity

    def slots_after(self, lengths: Sequence[int], num_new: int) -> int:
        """What `slots` is once `num_new` positions have been written after `lengths`."""
        if self.is_fixed:
            return self.most_slots
        seen = max(lengths) + num_new
        if self.window:
            # The first positions of a row see each other as they are written, not in the cache.
            seen = min(seen, self.window - 1 + (num_new if max(lengths) else 1))
        if seen <= self.slots:
            return self.slots
        return max(seen, min(self.most_slots, seen + max(seen // 2, GROWTH)))

    def write(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put row b's `keys` and `values` [B, H, n, E] at its positions from lengths[b] on.

        The first counts[b] of them (None: all) are the row's own, the others are padding, which
        later positions overwrite.

        Returns:
            all keys and values up to the end of the longest row [B, H, max(lengths) + n, E]; of a
            window those of all slots instead, in their order, once there are more positions than
            slots. What a row holds after its own end is finite, and for the caller to mask.

        Raises:
            DeepSpecError: the longest row does not fit.
        """
        num_new = keys.shape[2]
        end = max(lengths) + num_new
        if end > self.capacity:
            raise DeepSpecError(
                f"a row of {end} positions does not fit a cache of {self.capacity}",
                fix="allocate a cache as long as prompt, answer and one block together",
            )
        slots = self.slots_after(lengths, num_new)
        if num_new > slots:  # a window's first write: only the end of each row will be seen again
            ends = counts or [num_new] * self.rows
            latest = _relaid(keys, ends, slots), _relaid(values, ends, slots)
            if self.is_fixed:
                for stored, new in zip(self._grown(*latest, lengths, slots), latest, strict=True):
                    stored.copy_(new)
            else:
                self.pair = latest
            return keys, values
        first = lengths[0] % slots
        for stored, new in zip(
            self._grown(keys, values, lengths, slots), (keys, values), strict=True
        ):
            # no index tensors where rows are alike: a decode round at batch 1 is all overhead
            if min(lengths) == max(lengths) and first + num_new <= slots:
                stored[:, :, first : first + num_new] = new
            else:
                places = _places(tuple(lengths), num_new, slots, new.device)
                stored[places.rows, :, places.slots] = new.transpose(1, 2)
        return self.read(end)

    def write_at(self, keys: Tensor, values: Tensor, places: Places) -> None:
        """Put keys and values [B, H, n, E] into slots that only the device knows, of a layer that
        has memory.
        """
        for stored, new in zip(self.read(self.slots), (keys, values), strict=True):
            stored[places.rows, :, places.slots] = new.transpose(1, 2)

    def read(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Views of the first `num_positions` keys and values of every row, at most of all slots.

        Raises:
            DeepSpecError: nothing has been written yet.
        """
        if self.pair is None:
            raise DeepSpecError("nothing has been written to this cache", fix="prefill it first")
        keys, values = self.pair
        return keys[:, :, :num_positions], values[:, :, :num_positions]

    def put(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        fresh: "LayerCache",
        fresh_lengths: Sequence[int],
    ) -> None:
        """Copy all rows of another cache into these rows of this one, which has `lengths`."""
        if fresh.pair is None:
            return
        slots, longest = self.slots_after(fresh_lengths, 0), max(fresh_lengths)
        pair = self._grown(*fresh.pair, lengths, slots)
        places = row_numbers(tuple(rows), pair[0].device)
        for stored, new in zip(pair, fresh.pair, strict=True):
            if longest <= min(slots, fresh.slots):
                stored[places, :, :longest] = new[:, :, :longest]
            else:
                stored[places] = _relaid(new, fresh_lengths, slots)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.rows = len(rows)
        if self.pair is not None:
            keys, values = self.pair
            kept = row_numbers(tuple(rows), keys.device)
            if self.is_fixed:
                self._of_all_rows = self._of_all_rows or self.pair
                self.pair = moved_up(keys, kept), moved_up(values, kept)
            else:
                self.pair = keys[kept], values[kept]

    def restore(self) -> None:
        """Have the rows again that a fixed layer has dropped; what they hold is nobody's."""
        if self._of_all_rows is not None:
            self.pair, self._of_all_rows = self._of_all_rows, None
            self.rows = len(self.pair[0])

    def _grown(
        self, keys: Tensor, values: Tensor, lengths: Sequence[int], slots: int
    ) -> tuple[Tensor, Tensor]:
        """The pair with this many slots, of the type of these tensors where there is none yet."""
        if self.pair is None:
            # Zeros: a masked slot's weight is 0, and 0 times uninitialised memory may be NaN.
            shape = (self.rows, keys.shape[1], slots)
            self.pair = (
                keys.new_zeros(*shape, keys.shape[3]),
                values.new_zeros(*shape, values.shape[3]),
            )
        elif slots > self.slots:
            old_keys, old_values = self.pair
            self.pair = _relaid(old_keys, lengths, slots), _relaid(old_values, lengths, slots)
        return self.pair


def moved_up(stored: Tensor, rows: Tensor) -> Tensor:
    """Those rows of `stored` [B, ...] alone, in the place of its first ones."""
    stored[: len(rows)] = stored[rows]
    return stored[: len(rows)]


def latest_positions(ends: Tensor, slots: int) -> Tensor:
    """The last position before ends [B, 1] that belongs to each slot [B, slots]; below 0: none
    yet.
    """
    last = ends - 1
    return last - (last - torch.arange(slots, device=ends.device)) % slots


def _relaid(stored: Tensor, lengths: Sequence[int], slots: int) -> Tensor:
    """The latest positions of rows of these lengths, laid out over another number of slots."""
    before = stored.shape[2]
    if max(lengths) <= min(before, slots):  # every position is in the slot of its own number
        laid_out = stored.new_zeros(*stored.shape[:2], slots, stored.shape[3])
        laid_out[:, :, :before] = stored[:, :, :slots]
        return laid_out
    ends = row_starts(tuple(lengths), stored.device)
    places = latest_positions(ends, slots).clamp(min=0) % before
    return stored.gather(
        2, places[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
    )


@lru_cache(maxsize=8)  # all layers of a round write to the same places
def _places(lengths: tuple[int, ...], num_new: int, slots: int, device: torch.device) -> Places:
    return Places.after(row_starts(lengths, device), num_new, slots)
