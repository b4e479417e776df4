"""The target as a black box with hidden states: its forward pass, and the taps on its layers.

Capture and evaluation both go through `Target.forward`, so a draft sees in decoding what it saw in
training. Layer l means the output of decoder layer l (0-based) before the final norm; -1 is the
embedding output. B rows of a batch, T tokens, q new tokens of each row, m captured layers, D hidden
size, V vocabulary.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspec.errors import ConfigError
from deepspec.model.cache_shelf import CacheShelf
from deepspec.model.kv_cache import LayerCache
from deepspec.target.attention import EAGER, FLASH, GROUPED, KeyMask, set_attention
from deepspec.target.decoding_cache import TargetCache
from deepspec.target.structure import find_structure


class TargetOutput(NamedTuple):
    """Hidden states of one forward pass."""

    context: Tensor  # [B, T, m * D] the captured layers, concatenated in ascending order
    # [B, T, D] after the final norm: lm_head(last_hidden[t]) predicts token t + 1, with the
    # constant factor of a model that multiplies its logits by one
    last_hidden: Tensor


class Target:
    """A causal language model that only ever runs forward."""

    def __init__(self, model: Any, layer_ids: Sequence[int], *, logit_factor: float = 1.0) -> None:
        """`logit_factor` is what the model multiplies `lm_head(final hidden state)` by; the final
        hidden states here have it in them.

        Raises:
            ConfigError: no decoder layers, or no output head, are found.
        """
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.text_config = self.model.config.get_text_config()
        self.decoder, self.layers, self.embedding, self.lm_head = find_structure(self.model)
        self.layer_ids = tuple(layer_ids)
        self.logit_factor = logit_factor
        self.softcap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        self.device: torch.device = self.lm_head.weight.device
        self.dtype: torch.dtype = self.lm_head.weight.dtype
        self.packs = self.kernel == FLASH  # see `forward_packed`
        if self.kernel not in (FLASH, EAGER):
            try:
                set_attention(self.decoder, GROUPED)
            except ValueError:
                set_attention(self.decoder, EAGER)
        # transformers 5.24 renamed it and warns of the old name.
        names = inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"
        # tokens of the longest sequence that the target is made for
        self.max_positions: int = (
            getattr(self.text_config, "max_position_embeddings", None) or sys.maxsize
        )
        # why it cannot decode with a cache; empty where it can
        self.cannot_decode = ""
        # token ids that end an answer, according to the model's generation_config.json
        self.eos_ids = listed_ids(getattr(self.model.generation_config, "eos_token_id", None))
        # caches of decoding; a graph has one device
        devices = {parameter.device for parameter in self.model.parameters()}
        self.shelf = CacheShelf(
            self.device, graphs=self.device.type == "cuda" and len(devices) == 1
        )
        self._tapped: dict[int, Tensor] = {}
        for layer in self.layer_ids:
            if layer == -1:  # what the first layer reads: some models scale what they look up
                self.layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                self.layers[layer].register_forward_hook(partial(self._keep, layer))

    @property
    def kernel(self) -> str:
        """The name of its layers' attention in transformers."""
        return str(self.decoder.config._attn_implementation)

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Embedding and lm_head [V, D], which every draft has as well, by their names there; those
        of them that are on `device`.
        """
        weights = {
            "embed_tokens.weight": self.embedding.weight,
            "lm_head.weight": self.lm_head.weight,
        }
        return {name: weight for name, weight in weights.items() if weight.device == self.device}

    def _keep(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._tapped[layer] = output[0] if isinstance(output, tuple) else output

    def _keep_input(self, _module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self._tapped[-1] = inputs[0] if inputs else named["hidden_states"]

    @cached_property
    def windows(self) -> list[int]:
        """Tokens that each layer sees at a time, itself included; 0 is a layer that sees all.

        They are read off the masks that the model's own code gives to its layers, in one pass.
        """
        found = [0] * len(self.layers)

        def keep(layer: int, _module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            masks = [part for part in (*inputs, *named.values()) if isinstance(part, KeyMask)]
            found[layer] = max((mask.window for mask in masks), default=0)

        hooks = [
            layer.register_forward_pre_hook(partial(keep, number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            Target.forward(self, one, TargetCache(found, 1, 1, self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @property
    def window(self) -> int:
        """Tokens that a sliding layer sees; 0 where there is no such layer."""
        return max(self.windows)

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
            positions, _ = cache.step(input_ids.shape[1])
            output = self.decoder(
                input_ids=input_ids,
                position_ids=positions,
                use_cache=True,
                **{self._cache_argument: cache},
            )
        return self.taken(output.last_hidden_state)

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
        packed = self.taken(output.last_hidden_state)
        contexts = packed.context[0].split(lengths)
        last_hidden = packed.last_hidden[0].split(lengths)
        return [TargetOutput(*parts) for parts in zip(contexts, last_hidden, strict=True)]

    def taken(self, last_hidden: Tensor, context: Tensor | None = None) -> TargetOutput:
        """The output of a pass whose decoder returned `last_hidden` [B, T, D]; its context is what
        the taps of the pass kept, unless it is given.
        """
        if context is None:
            # the layers of a target that is spread over GPUs leave their outputs where they are
            parts = [self._tapped[layer].to(self.device) for layer in self.layer_ids]
            self._tapped.clear()
            context = torch.cat(parts, dim=-1)
        last_hidden = last_hidden.to(self.device)
        if self.logit_factor != 1.0:
            last_hidden = last_hidden * self.logit_factor
        return TargetOutput(context, last_hidden)

    @torch.inference_mode()
    def logits(self, last_hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of final hidden states [..., D], in the model's dtype."""
        logits: Tensor = self.lm_head(last_hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def new_cache(self, rows: int, capacity: int) -> TargetCache:
        """Room for `rows` sequences of at most `capacity` tokens; memory is taken as they grow.

        Raises:
            ConfigError: the target was found not to decode with a cache.
        """
        if self.cannot_decode:
            raise ConfigError(
                f"the target cannot be decoded with a cache: {self.cannot_decode}",
                where="target.model",
                fix="take answers from a server (answers.engine); capture needs no cache",
            )
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
