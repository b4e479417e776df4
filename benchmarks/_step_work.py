"""What one micro-batch of a block draft computes and moves, from shapes alone.

FLOP are those of the matrix products (2 for each multiplication and its sum). Bytes are what each
product and each compiled kernel reads and writes, once each: no cache, no repetition.

T tokens, S slots of all blocks, N of them counted, U target positions, P trained parameters.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, Self

from deepspec.model.anchors import BlockPlan
from deepspec.model.spec import DraftSpec

EXACT = 4  # bytes of a float32: weights, gradients and the optimizer's state
# Of each parameter the gradient is divided, measured and clipped, and AdamW reads four and writes
# three numbers.
OPTIMIZER_BYTES = (2 + 1 + 2 + 7) * EXACT


class Work(NamedTuple):
    """FLOP of matrix products, and bytes read and written."""

    flops: float
    num_bytes: float

    @classmethod
    def total(cls, works: Iterable["Work"]) -> Self:
        return cls(*map(sum, zip(*works, strict=True)))

    def times(self, factor: float) -> "Work":
        return Work(factor * self.flops, factor * self.num_bytes)


class Sizes(NamedTuple):
    """What decides the work of a micro-batch beside the draft's own sizes."""

    num_tokens: int  # T
    num_slots: int  # S
    num_counted: int  # N
    num_targets: int  # U
    num_seen: int  # pairs of a slot and a key that it sees
    chunk_slots: int  # that the loss scores at a time
    num_trained: int  # P
    width: int  # bytes of a number that is computed with

    @classmethod
    def of(cls, plan: BlockPlan, *, chunk_slots: int, num_trained: int, width: int) -> Self:
        num_blocks, num_queries = len(plan.anchors), plan.visibility.block_size
        seen = int((plan.anchors - plan.samples.starts).sum())
        num_slots = num_blocks * num_queries
        return cls(
            num_tokens=len(plan.positions),
            num_slots=num_slots,
            num_counted=len(plan.slots),
            num_targets=len(plan.targets.distinct),
            num_seen=(seen + num_slots) * num_queries,
            chunk_slots=chunk_slots,
            num_trained=num_trained,
            width=width,
        )


def step_work(spec: DraftSpec, sizes: Sizes) -> dict[str, Work]:
    """The work of each part of a micro-batch, and of the optimizer's step after it."""
    fusing, layers = _fusing(spec, sizes), _layers(spec, sizes)
    seen = 4 * sizes.num_seen * spec.heads.num_heads * spec.heads.head_dim  # scores and their sum
    heads = 2 * (spec.heads.num_heads + spec.heads.num_kv_heads) * spec.heads.head_dim
    flex = Work(seen, heads * sizes.num_slots * sizes.width).times(spec.num_layers)
    context = sizes.num_tokens * (spec.num_context_features + spec.hidden_size) * sizes.width
    return {
        "backbone forward": Work.total([fusing, layers]),
        "loss": _loss(spec, sizes),
        # by weights and by inputs; what is fused came from the target, and needs no gradient
        "backward": Work.total([fusing, layers.times(2)]),
        "flex": flex.times(3.5),  # the backward pass computes scores once more, and four products
        "optimizer": Work(0, OPTIMIZER_BYTES * sizes.num_trained),
        # states from the host, weights cast to what is computed in
        "copies": Work(0, 2 * context + (EXACT + sizes.width) * sizes.num_trained),
    }


def _product(rows: float, inner: float, columns: float, width: int) -> Work:
    """[rows, inner] times [inner, columns]."""
    moved = rows * inner + inner * columns + rows * columns
    return Work(2 * rows * inner * columns, width * moved)


def _fusing(spec: DraftSpec, sizes: Sizes) -> Work:
    return _product(sizes.num_tokens, spec.num_context_features, spec.hidden_size, sizes.width)


def _layers(spec: DraftSpec, sizes: Sizes) -> Work:
    """Everything of the layers but attention's scores, forward."""
    size, inner, heads, width = spec.hidden_size, spec.intermediate_size, spec.heads, sizes.width
    queries, keys = (num * heads.head_dim for num in (heads.num_heads, heads.num_kv_heads))
    keys_values = keys if heads.values_are_keys else 2 * keys
    slots, tokens = sizes.num_slots, sizes.num_tokens
    products = [
        _product(tokens, size, keys_values, width),
        _product(slots, size, keys_values, width),
        _product(slots, size, queries, width),
        _product(slots, queries, size, width),
        *[_product(slots, size, inner, width)] * 2,
        _product(slots, inner, size, width),
    ]
    # norms and residuals; queries and keys turned; two inner states to one
    kernels = 6 * slots * size + 2 * (slots * (queries + keys) + tokens * keys) + 3 * slots * inner
    return Work.total([*products, Work(0, width * kernels)]).times(spec.num_layers)


def _loss(spec: DraftSpec, sizes: Sizes) -> Work:
    """Logits of slots and targets, the terms in three passes, and their gradient."""
    size, vocabulary, width = spec.hidden_size, spec.vocab_size, sizes.width
    num_chunks = math.ceil(sizes.num_counted / sizes.chunk_slots)
    slots, targets = sizes.num_counted / num_chunks, sizes.num_targets / num_chunks
    rank = spec.markov.rank if spec.markov else 0
    products = [
        *[_product(slots, size, vocabulary, width)] * 2,  # logits, and back to the states
        _product(targets, size, vocabulary, width),
        *[_product(slots, rank, vocabulary, width)] * (3 if rank else 0),
    ]
    added = 2 * EXACT * rank * vocabulary  # of W2's gradient
    terms = width * vocabulary * (3 * (2 + bool(rank)) * slots + targets + slots)
    return Work.total([*products, Work(0, added + terms)]).times(num_chunks)
