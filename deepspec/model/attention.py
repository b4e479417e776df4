"""Attention of training: a query sees a run of its sample's tokens, and all slots of its block.

All samples of a batch lie in one packed row; what separates them is where a query's run starts.
Compiled flex attention where it works, with tiles that no query sees left out; elsewhere plain
PyTorch, sample by sample. T tokens, K blocks, g block size, n = K * g queries, c keys and values
per query of its own, H heads, G key-value heads, E head size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from deepspec.model.execution import compiled, compute_dtype
from deepspec.model.flex_kernel import kernel_options
from deepspec.model.host_copy import HOST, send, send_all

KeysValues = tuple[Tensor, Tensor]  # [1, G, L, E] each
TILE = 128  # queries and keys that flex attention works on at a time


class SampleVisibility(NamedTuple):
    """What the blocks of one sample see."""

    start: int  # of the run of tokens that some of them see
    end: int
    last: Tensor  # of each block, on the device


@dataclass(frozen=True, eq=False)
class BlockVisibility:
    """The row's tokens that the queries of each block see: from `first` to before `last`.

    It is of the host. A device is sent what is made of it once, for all layers and passes.
    """

    first: Tensor  # [K] long, where the block's sample starts
    last: Tensor  # [K] long
    block_size: int
    path: Literal["flex", "dense"] = "dense"
    _masks: dict[tuple[int, int], BlockMask] = field(default_factory=dict, repr=False)
    _samples: list[SampleVisibility] = field(default_factory=list, repr=False)

    def along(self, path: Literal["flex", "dense"]) -> "BlockVisibility":
        """The same for attention on this path."""
        return replace(self, path=path)

    def prepare(self, *, num_tokens: int, copies: Iterable[int], device: torch.device) -> None:
        """Make a GPU's masks now, beside the step in use, and not where attention needs them."""
        if device.type == "cuda" and len(self.first):
            for number in copies:
                self.mask(num_tokens=num_tokens, copies=number, device=device)

    def mask(self, *, num_tokens: int, copies: int, device: torch.device) -> BlockMask:
        """The `tiles` of these sizes."""
        sizes = num_tokens, copies
        if sizes not in self._masks:
            self._masks[sizes] = tiles(self, num_tokens=num_tokens, copies=copies, device=device)
        return self._masks[sizes]

    def samples(self, device: torch.device) -> list[SampleVisibility]:
        """What each sample's blocks see, without gaps between blocks."""
        if not self._samples:
            firsts, counts = (
                values.tolist()
                for values in torch.unique_consecutive(self.first, return_counts=True)
            )
            ends = [int(last.max()) for last in self.last.split(counts)]
            seen = 0
            for first, end, last in zip(
                firsts, ends, send(self.last, device).split(counts), strict=True
            ):
                # fill comes after the samples, and its blocks have 0 for both
                start = max(first, seen)
                seen = max(start, end)
                self._samples.append(SampleVisibility(start, seen, last))
        return self._samples


def attend(
    queries: Tensor,
    context: KeysValues,
    own: Sequence[KeysValues],
    visibility: BlockVisibility,
    *,
    scale: float,
) -> Tensor:
    """Attention output [1, n, H * E] of queries [1, n, H, E].

    Args:
        queries: of all blocks, one after the other.
        context: keys and values of the row's tokens.
        own: keys and values of the slots themselves (n each): those of its own block are seen, of
            each entry.
        visibility: what a query sees of `context`.
        scale: factor on the scores.
    """
    if visibility.path == "dense":
        # scores are as exact as the rotated queries and keys
        with torch.autocast(queries.device.type, enabled=False):
            return sample_by_sample(queries.transpose(1, 2)[0] * scale, context, own, visibility)
    # Autocast does not know flex attention, and rotated queries come in the tables' float32.
    dtype = compute_dtype(queries)
    keys, values = (
        torch.cat([pair[kind] for pair in (context, *own)], 2).to(dtype) for kind in (0, 1)
    )
    # Not compiled, flex attention computes dense scores and saves nothing (trap D10).
    on_gpu, head_dim = queries.is_cuda, queries.shape[3]
    kernel: Any = compiled(flex_attention) if on_gpu else flex_attention
    out = kernel(
        queries.transpose(1, 2).to(dtype),
        keys,
        values,
        block_mask=visibility.mask(
            num_tokens=context[0].shape[2], copies=len(own), device=queries.device
        ),
        scale=scale,
        enable_gqa=queries.shape[2] != keys.shape[1],
        kernel_options=kernel_options(queries.device, dtype, head_dim) if on_gpu else None,
    )
    return cast("Tensor", out).transpose(1, 2).flatten(2)


def sample_by_sample(
    queries: Tensor, context: KeysValues, own: Sequence[KeysValues], visibility: BlockVisibility
) -> Tensor:
    """[1, n, H * E], sample by sample; `queries` [H, n, E] are scaled.

    Tensors are split once for all samples: the gradient of a slice would be a tensor as large as
    all of them together.
    """
    size, samples = visibility.block_size, visibility.samples(queries.device)
    bounds = [bound for sample in samples for bound in (sample.start, sample.end)]
    runs = np.diff([0, *bounds, context[0].shape[2]]).tolist()  # of gaps and samples in turn
    num_slots = [len(sample.last) * size for sample in samples]

    def split(pair: KeysValues, sizes: list[int]) -> list[KeysValues]:
        keys, values = (x[0].to(queries.dtype).split(sizes, 1) for x in pair)
        return list(zip(keys, values, strict=True))

    contexts = split(context, runs)[1::2]
    own_slots = [split(pair, num_slots) for pair in own]
    each = zip(samples, queries.split(num_slots, 1), contexts, *own_slots, strict=True)
    parts = [_attend_sample(sample, *tensors, size=size) for sample, *tensors in each]
    return torch.cat(parts, 1).transpose(0, 1).flatten(1)[None]


def _attend_sample(
    sample: SampleVisibility, queries: Tensor, context: KeysValues, *own: KeysValues, size: int
) -> Tensor:
    """[H, n, E] of one sample's queries [H, n, E] over its run of tokens and its own slots.

    Keys and values of the run are [G, t, E], those of the slots [G, n, E].
    """
    keys, values = context
    num_groups, num_tokens, _ = keys.shape
    places = torch.arange(sample.start, sample.end, device=keys.device)
    unseen = (places >= sample.last[:, None]).repeat_interleave(size, 0)
    grouped = queries.unflatten(0, (num_groups, -1))  # heads that share keys are further queries
    by_block = grouped.unflatten(2, (-1, size))
    scores = (
        (grouped.flatten(1, 2) @ keys.transpose(1, 2))
        .view(*grouped.shape[:3], num_tokens)
        .masked_fill(unseen, -torch.inf)
    )
    own_scores = [
        (by_block @ _blocks(own_keys, size).transpose(-1, -2)).flatten(2, 3) for own_keys, _ in own
    ]
    weights = torch.cat([scores, *own_scores], -1).softmax(-1)
    of_tokens, *of_own = weights.split([num_tokens, *[size] * len(own)], -1)
    out = (of_tokens.flatten(1, 2) @ values).view(grouped.shape)
    for seen, (_, own_values) in zip(of_own, own, strict=True):
        out = out + (seen.unflatten(2, (-1, size)) @ _blocks(own_values, size)).flatten(2, 3)
    return out.flatten(0, 1)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[G, n, E] -> [G, 1, K, g, E]."""
    return x.unflatten(1, (-1, size))[:, None]


def tiles(
    visibility: BlockVisibility, *, num_tokens: int, copies: int, device: torch.device = HOST
) -> BlockMask:
    """The tiles of 128 queries x 128 keys in which something is seen, found without single keys.

    Keys are the row's tokens, then `copies` times the slots. PyTorch's own helper evaluates the
    mask of every key: a gigabyte for 8,192 tokens with 512 anchors a sample. The tiles are found on
    the host and sent: there is nothing to wait for, and no kernel between those of training.
    """
    size = visibility.block_size
    num_queries = len(visibility.first) * size
    num_keys = num_tokens + copies * num_queries
    # Numbers captured as such would be compiled in, and every new length would compile again.
    sizes = torch.tensor(num_tokens), torch.tensor(num_queries)
    first, last, width, period = send_all((visibility.first, visibility.last, *sizes), device)

    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // size
        in_own = (key >= width) & ((key - width) % period // size == block)
        # `last` lies within the tokens
        return ((key >= first[block]) & (key < last[block])) | in_own

    low, rows = torch.arange(0, num_keys, TILE), torch.arange(0, num_queries, TILE)
    queries = torch.arange(len(rows) * TILE).clamp(max=num_queries - 1)
    bounds = torch.stack([visibility.first, visibility.last])[:, (queries // size).view(-1, TILE)]
    (first_min, last_min), (first_max, last_max) = bounds.amin(-1), bounds.amax(-1)  # [rows] each
    some = (low < last_max[:, None]) & (low + TILE > first_min[:, None])
    whole = (low >= first_max[:, None]) & (low + TILE <= last_min[:, None])
    # of all blocks that the tile has a query of
    slots = rows // size * size, (rows + TILE + size - 1) // size * size
    for copy in range(copies):
        start, end = (
            num_tokens + copy * num_queries + bound.clamp(max=num_queries)[:, None]
            for bound in slots
        )
        some |= (low < end) & (low + TILE > start)
    # by queries, and by keys for the gradient
    lists = [_listed(chosen) for part in (some & ~whole, whole) for chosen in (part, part.T)]
    by_queries, by_keys, whole_by_queries, whole_by_keys = send_all(tuple(lists), device)
    return BlockMask(
        (num_queries, num_keys),
        *by_queries,
        *whole_by_queries,
        *by_keys,
        *whole_by_keys,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=sees,
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen tiles [1, 1, rows], and all tiles of a row with the chosen ones first."""
    order = (~chosen).contiguous().to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order[None, None]
