"""Transformer layers of a draft; a family is a record, so there is one class for all of them.

B batch, n new positions, L all positions, T context tokens, D hidden size, H heads, K key-value
heads, E head dimension.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.config.families import RopeSettings
from deepspec.model.attention import BlockVisibility, attend
from deepspec.model.execution import Execution
from deepspec.model.spec import DraftSpec


class Rotation(NamedTuple):
    """Cosines and sines of positions [(B,) n, 1, E]; the first half of the sines is negated."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor | slice) -> "Rotation":
        """Those of `positions` [n], out of a table [L, 1, E]."""
        return Rotation(self.cos[positions], self.sin[positions])


class RotaryTable:
    """Rotations by position, computed in float32 and only then rounded to the compute dtype.

    No buffer of a module on purpose: `.to(bfloat16)` would round the frequencies, and far positions
    would turn wrongly.
    """

    def __init__(self, settings: RopeSettings, head_dim: int) -> None:
        exponents = (
            torch.arange(0, 2 * settings.num_rotated, 2, dtype=torch.float32, device="cpu")
            / head_dim
        )
        still = torch.zeros(head_dim // 2 - settings.num_rotated, device="cpu")
        self.inverse_frequencies = torch.cat([1.0 / settings.theta**exponents, still])  # [E / 2]
        self._tables: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def __call__(self, num_positions: int, *, like: Tensor) -> Rotation:
        """Rotations of at least the first `num_positions` positions, [L, 1, E] each.

        Their dtype and device are those of `like`.
        """
        kind = like.device, like.dtype
        table = self._tables.get(kind)
        if table is None or len(table.cos) < num_positions:
            # the table outlives this call and may be used in training later
            with torch.inference_mode(mode=False):
                positions = torch.arange(1 << (num_positions - 1).bit_length(), dtype=torch.float32)
                angles = positions[:, None, None] * self.inverse_frequencies
                cos, sin = angles.cos(), angles.sin()
                halves = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
                table = Rotation(*(half.to(like) for half in halves))
            self._tables[kind] = table
        return table


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + E/2) of the last dimension of `x` [B, n, heads, E]."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm; the mean is taken in float32 whatever the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., size] with its last dimension normalized and scaled by the weight."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Queries over keys and values that the caller collects; `input_size` is D (Eagle3: 2 D)."""

    def __init__(self, spec: DraftSpec, *, input_size: int) -> None:
        super().__init__()
        heads = spec.heads
        size, kv_size = (num * heads.head_dim for num in (heads.num_heads, heads.num_kv_heads))
        self.heads, self.eps, self.value_norm = heads, spec.rms_norm_eps, spec.family.value_norm
        self.scale = spec.attention_scale
        self.q_proj = nn.Linear(input_size, size, bias=False)
        self.k_proj = nn.Linear(input_size, kv_size, bias=False)
        if not heads.values_are_keys:
            self.v_proj = nn.Linear(input_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, spec.hidden_size, bias=False)
        self.q_norm = RMSNorm(heads.head_dim, spec.rms_norm_eps)
        self.k_norm = RMSNorm(heads.head_dim, spec.rms_norm_eps)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, n, input_size] -> [B, n, H, E]."""
        return rotate(
            self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.heads.head_dim))), rotation
        )

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, n, input_size] -> two of [B, K, n, E]."""
        size = (-1, self.heads.head_dim)
        keys = self.k_proj(x).unflatten(-1, size)
        values = keys if self.heads.values_are_keys else self.v_proj(x).unflatten(-1, size)
        if self.value_norm:
            values = F.rms_norm(values, size[1:], eps=self.eps)
        return rotate(self.k_norm(keys), rotation).transpose(1, 2), values.transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention output [B, n, D] of new positions, all of which see the same keys of their row.

        `mask` [B, 1, 1, L] says which; None is all of them.
        """
        # Heads that share keys become further queries: no copies of the keys, and one matmul for
        # the group.
        grouped = queries.unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            grouped.flatten(2, 3), keys, values, attn_mask=mask, scale=self.scale
        )
        by_head = out.unflatten(2, (-1, queries.shape[1])).flatten(1, 2)
        return self.o_proj(by_head.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated feed-forward layer: SwiGLU, or GeGLU with the tanh approximation."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        size, inner = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.activation = nn.SiLU() if spec.activation == "silu" else nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP with the family's norms around them."""

    layer_scalar: Tensor

    def __init__(self, spec: DraftSpec, *, input_size: int) -> None:
        super().__init__()
        size, eps, self.family = spec.hidden_size, spec.rms_norm_eps, spec.family
        self.self_attn = Attention(spec, input_size=input_size)
        self.mlp = MLP(spec)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        if self.family.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)
        if self.family.layer_scalar:
            self.register_buffer("layer_scalar", torch.ones(1))

    def after_attention(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output [B, n, D], given its residual stream and what its attention gave."""
        if self.family.sandwich_norms:
            x = residual + self.post_attention_layernorm(attended)
            x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = residual + attended
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x * self.layer_scalar if self.family.layer_scalar else x

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        mask: Tensor | None,
    ) -> Tensor:
        """Decoding: the output of the next positions `x` [B, n, D].

        `write` puts their keys and values into the cache, and returns all that they see.
        """
        normed = self.input_layernorm(x)
        keys, values = write(*self.self_attn.keys_values(normed, rotation))
        return self.after_attention(
            x, self.self_attn.attend(self.self_attn.queries(normed, rotation), keys, values, mask)
        )

    def over_blocks(
        self,
        x: Tensor,
        fused: Tensor,
        rotations: tuple[Rotation, Rotation],
        visibility: BlockVisibility,
        execution: Execution,
    ) -> Tensor:
        """Training: the output of the slots of all blocks `x` [1, n, D].

        They see the fused context [1, T, D] and their own block.
        """
        of_context, of_slots = rotations
        run, attention = execution.positionwise, self.self_attn
        context = run(Attention.keys_values, attention, fused, of_context)
        normed = run(RMSNorm.forward, self.input_layernorm, x)
        own = run(Attention.keys_values, attention, normed, of_slots)
        attended = attend(
            run(Attention.queries, attention, normed, of_slots),
            context,
            [own],
            visibility,
            scale=attention.scale,
        )
        return run(type(self).after_attention, self, x, attention.o_proj(attended))


class Layers(nn.ModuleList):
    """The draft's decoder layers, with their type."""

    def __iter__(self) -> Iterator[DecoderLayer]:
        return cast("Iterator[DecoderLayer]", super().__iter__())


@lru_cache
def embedding_scale(hidden_size: int, dtype: torch.dtype) -> float:
    """sqrt(hidden_size), rounded to the weights' dtype as Gemma does."""
    return float(torch.tensor(math.sqrt(hidden_size)).to(dtype))
