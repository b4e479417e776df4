"""The target as a black box with hidden states: its forward pass, and the taps on its layers.

Capture and evaluation both go through `Target.forward`, so a draft sees in decoding what it saw in
training. Layer l means the output of decoder layer l (0-based) before the final norm; -1 is the
embedding output. B rows of a batch, T tokens, q new tokens of each row, m captured layers, D hidden
size, V vocabulary.
"""

import inspect
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspec.model.cache_shelf import CacheShelf
from deepspec.model.host_copy import row_starts
from deepspec.model.kv_cache import LayerCache, latest_positions
from deepspec.model.row_cache import RowCache
from deepspec.target.attention import FLASH, KeyMask, use_grouped_attention


class TargetOutput(NamedTuple):
    """Hidden states of one forward pass."""

    context: Tensor  # [B, T, m * D] the captured layers, concatenated in ascending order
    # [B, T, D] after the final norm: lm_head(last_hidden[t]) predicts token t + 1
    last_hidden: Tensor


class TargetCache(RowCache):
    """Takes the place of transformers' Cache, of which attention layers call only `update`.

    Each row has a length of its own, so that rejected tokens can be taken back.
    """

    def __init__(
        self, windows: Sequence[int], rows: int, capacity: int, device: torch.device
    ) -> None:
        super().__init__(windows, rows, capacity)
        self.positions = torch.arange(capacity, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take so far."""
        pairs = [layer.pair for layer in self.layers if layer.pair]
        return sum(part.nbytes for pair in pairs for part in pair)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, q, E] of a layer; returns all of that layer's."""
        return self.write(self.layers[layer_idx], keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the longest row (part of transformers' interface)."""
        return max(self.lengths)

    def step(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions of the next `num_tokens` tokens of each row, and the keys that they see.

        Returns:
            positions [B, q] (or [1, q] where all rows are equally long) and the mask
            [B, 1, q, longest row + q], bool, in a graph of its extent.
        """
        end = self.end(num_tokens)
        if self.device_step is not None:
            positions = self.device_step.starts + self.positions[:num_tokens]
        elif min(self.lengths) + num_tokens == end:
            positions = self.positions[None, end - num_tokens : end]
        else:
            starts = row_starts(tuple(self.lengths), self.positions.device)
            positions = starts + self.positions[:num_tokens]
        return positions, (self.positions[:end] <= positions[:, :, None])[:, None]

    def window_mask(self, positions: Tensor, causal: Tensor) -> Tensor:
        """The keys that `positions`, and `causal`, of `step` see in layers with a window.

        They are [B, 1, q, K], of the K keys that `update` returns there.
        """
        layer = next(layer for layer in self.layers if layer.window)
        num_tokens, end = positions.shape[1], causal.shape[-1]
        slots = layer.slots_after(self.lengths, num_tokens)
        if end <= slots or not max(self.lengths):
            near = self.positions[:end] > positions[:, :, None] - layer.window
            return causal & near[:, None]
        keys = latest_positions(positions[:, -1:] + 1, slots)[:, None]
        distance = positions[:, :, None] - keys
        return ((keys >= 0) & (distance >= 0) & (distance < layer.window))[:, None]


class Target:
    """A causal language model that only ever runs forward."""

    def __init__(self, model: Any, layer_ids: Sequence[int]) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.decoder = self.model.get_decoder()
        self.text_config = self.model.config.get_text_config()
        self.lm_head = self.model.get_output_embeddings()
        self.layer_ids = tuple(layer_ids)
        self.softcap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        self.device: torch.device = self.lm_head.weight.device
        self.dtype: torch.dtype = self.lm_head.weight.dtype
        self.packs = self.text_config._attn_implementation == FLASH  # see `forward_packed`
        if not self.packs:
            use_grouped_attention(self.decoder)
        # transformers 5.24 renamed it and warns of the old name.
        names = inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"
        full = ["full_attention"] * self.text_config.num_hidden_layers
        kinds = getattr(self.text_config, "layer_types", None) or full
        # tokens that a sliding layer sees; 0 where there is no such layer
        self.window = self.text_config.sliding_window if "sliding_attention" in kinds else 0
        # the same of each layer; 0 is a layer that sees all
        self.windows = [self.window if kind == "sliding_attention" else 0 for kind in kinds]
        # tokens of the longest sequence that the target is made for
        self.max_positions: int = self.text_config.max_position_embeddings
        # token ids that end an answer, according to the model's generation_config.json
        self.eos_ids = listed_ids(getattr(self.model.generation_config, "eos_token_id", None))
        # caches of decoding; a graph has one device
        devices = {parameter.device for parameter in self.model.parameters()}
        self.shelf = CacheShelf(
            self.device, graphs=self.device.type == "cuda" and len(devices) == 1
        )
        self._tapped: dict[int, Tensor] = {}
        for layer in self.layer_ids:
            module = self.decoder.embed_tokens if layer == -1 else self.decoder.layers[layer]
            module.register_forward_hook(partial(self._keep, layer))

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Embedding and lm_head [V, D], which every draft has as well, by their names there; those
        of them that are on `device`.
        """
        embedding = self.model.get_input_embeddings()
        weights = {"embed_tokens.weight": embedding.weight, "lm_head.weight": self.lm_head.weight}
        return {name: weight for name, weight in weights.items() if weight.device == self.device}

    def _keep(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._tapped[layer] = output[0] if isinstance(output, tuple) else output

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, cache: TargetCache | None = None) -> TargetOutput:
        """Hidden states of `input_ids` [B, T] long, which continue the rows of a cache if given.

        The caller then moves the cache's lengths. Rows of unequal length are padded on the right:
        attention is causal, so the padding never reaches a row's own tokens.
        """
        self._tapped.clear()  # a pass that ran out of memory has left some
        if cache is None:
            output = self.decoder(input_ids=input_ids, use_cache=False)
        else:
            positions, visible = cache.step(input_ids.shape[1])
            masks = self._masks(cache, visible, positions)
            output = self.decoder(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask={kind: KeyMask(mask) for kind, mask in masks.items()},
                use_cache=True,
                **{self._cache_argument: cache},
            )
        return self._output(output.last_hidden_state)

    @torch.inference_mode()
    def forward_packed(self, sequences: Sequence[Sequence[int]]) -> list[TargetOutput]:
        """Hidden states of each sequence, [T, m * D] and [T, D], from one row without padding.

        Positions that start again at 0 show transformers where a document begins. flash-attention
        then skips everything between documents; SDPA would compute and mask it, which is why only
        the former `packs`.
        """
        self._tapped.clear()
        lengths = [len(sequence) for sequence in sequences]
        ids = [token for sequence in sequences for token in sequence]
        positions = [position for length in lengths for position in range(length)]
        output = self.decoder(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
        )
        packed = self._output(output.last_hidden_state)
        contexts = packed.context[0].split(lengths)
        last_hidden = packed.last_hidden[0].split(lengths)
        return [TargetOutput(*parts) for parts in zip(contexts, last_hidden, strict=True)]

    def _output(self, last_hidden: Tensor) -> TargetOutput:
        # the layers of a target that is spread over GPUs leave their outputs where they are
        parts = [self._tapped[layer].to(self.device) for layer in self.layer_ids]
        self._tapped.clear()
        return TargetOutput(torch.cat(parts, dim=-1), last_hidden.to(self.device))

    def _masks(self, cache: TargetCache, causal: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The mask of each kind of attention layer, of which some see a sliding window only."""
        masks = {"full_attention": causal}
        if self.window:
            masks["sliding_attention"] = cache.window_mask(positions, causal)
        return masks

    @torch.inference_mode()
    def logits(self, last_hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of final hidden states [..., D], in the model's dtype."""
        logits: Tensor = self.lm_head(last_hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def new_cache(self, rows: int, capacity: int) -> TargetCache:
        """Room for `rows` sequences of at most `capacity` tokens; memory is taken as they grow."""
        return TargetCache(self.windows, rows, capacity, self.device)

    def row_bytes(self, capacity: int) -> int:
        """Bytes of keys and values of a row of `capacity` tokens, on the device with most."""
        on_device = Counter[torch.device]()
        for window, (device, num_bytes) in zip(self.windows, self._token_bytes, strict=True):
            on_device[device] += num_bytes * LayerCache(1, capacity, window).most_slots
        return max(on_device.values())

    @cached_property
    def _token_bytes(self) -> list[tuple[torch.device, int]]:
        """Of each layer's keys and values of one token, as the layer writes them, and where."""
        cache = self.new_cache(1, 1)
        self.forward(torch.zeros(1, 1, dtype=torch.long, device=self.device), cache)
        # A layer that uses the keys and values of another writes none.
        return [
            (layer.pair[0].device, sum(part.nbytes for part in layer.pair))
            if layer.pair
            else (self.device, 0)
            for layer in cache.layers
        ]


def listed_ids(eos: int | Sequence[int] | None) -> list[int]:
    """The token ids of a generation config's `eos_token_id`, which has one, several or none."""
    return [eos] if isinstance(eos, int) else list(eos or ())
