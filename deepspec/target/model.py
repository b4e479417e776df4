"""The target model: loading it, and the one function that taps its hidden states.

Capture and evaluation both go through `Target.forward`, so a draft sees in decoding what it saw in
training. Layer l means the output of decoder layer l (0-based) before the final norm; -1 is the
embedding output. B batch, T tokens, m captured layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspec.errors import ConfigError
from deepspec.model.kv_cache import LayerCache
from deepspec.target.kv_cache import TargetCache

log = logging.getLogger(__name__)

FLASH = "flash_attention_2"


class TargetOutput(NamedTuple):
    context: Tensor  # [B, T, m * D] the captured layers, side by side in ascending order
    # [B, T, D] after the final norm: lm_head(last_hidden[t]) predicts token t + 1
    last_hidden: Tensor


class Target:
    """A causal language model that only ever runs forward."""

    def __init__(self, model: Any, layer_ids: Sequence[int]) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.decoder = self.model.get_decoder()
        self.text_config = self.model.config.get_text_config()
        self.lm_head = self.model.get_output_embeddings()
        self.layer_ids = tuple(layer_ids)
        self.softcap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        self.device, self.dtype = self.lm_head.weight.device, self.lm_head.weight.dtype
        self.packs = self.text_config._attn_implementation == FLASH
        check_layer_ids(self.layer_ids, self.text_config.num_hidden_layers)
        self._tapped: dict[int, Tensor] = {}
        for layer in self.layer_ids:
            module = self.decoder.embed_tokens if layer == -1 else self.decoder.layers[layer]
            module.register_forward_hook(self._tap(layer))

    def _tap(self, layer: int) -> Any:
        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
            self._tapped[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    @property
    def max_positions(self) -> int:
        return int(self.text_config.max_position_embeddings)

    @property
    def generation_eos(self) -> int | list[int] | None:
        return getattr(self.model.generation_config, "eos_token_id", None)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, cache: TargetCache | None = None) -> TargetOutput:
        """Hidden states of `input_ids` [B, T] long; with a cache they continue its rows, whose
        lengths the caller moves.

        Without a cache, rows of unequal length are padded on the right: attention is causal, so
        what stands behind a row's last token does not reach it.
        """
        if cache is None:
            output = self.decoder(input_ids=input_ids, use_cache=False)
        else:
            positions, mask = cache.step(input_ids.shape[1])
            masks = self._masks(mask, positions)
            output = self.decoder(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=True,
            )
        return self._output(output.last_hidden_state)

    @torch.inference_mode()
    def forward_packed(self, sequences: Sequence[Sequence[int]]) -> list[TargetOutput]:
        """Hidden states of each sequence, [T, m * D] and [T, D], computed as one row without
        padding.

        Positions that start again at 0 tell transformers where a document begins. flash-attention
        then skips everything between documents; SDPA would compute and mask it, which is why only
        the former `packs`.
        """
        ids = torch.tensor(
            [[token for sequence in sequences for token in sequence]], device=self.device
        )
        positions = torch.cat(
            [torch.arange(len(sequence), device=self.device) for sequence in sequences]
        )[None]
        output = self.decoder(input_ids=ids, position_ids=positions, use_cache=False)
        lengths = [len(sequence) for sequence in sequences]
        whole = self._output(output.last_hidden_state)
        return [
            TargetOutput(*parts)
            for parts in zip(
                whole.context[0].split(lengths), whole.last_hidden[0].split(lengths), strict=True
            )
        ]

    def _output(self, last_hidden: Tensor) -> TargetOutput:
        context = torch.cat([self._tapped[layer] for layer in self.layer_ids], dim=-1)
        self._tapped.clear()
        return TargetOutput(context, last_hidden)

    def _masks(self, causal: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The mask of each kind of attention layer; a sliding window also hides what is too far
        back.
        """
        masks = {"full_attention": causal}
        if "sliding_attention" in (getattr(self.text_config, "layer_types", None) or ()):
            keys = torch.arange(causal.shape[-1], device=causal.device)
            near = keys[None, None] > positions[:, :, None] - self.text_config.sliding_window
            masks["sliding_attention"] = causal & near[:, None]
        return masks

    @torch.inference_mode()
    def logits(self, last_hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of final hidden states [..., D], in the model's dtype."""
        logits: Tensor = self.lm_head(last_hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def new_cache(self, rows: int, capacity: int) -> TargetCache:
        """Room for `rows` sequences of at most `capacity` tokens; memory is taken when a layer
        is first written.
        """
        layers = [LayerCache(rows, capacity) for _ in range(self.text_config.num_hidden_layers)]
        return TargetCache(layers, capacity, self.device)


def check_layer_ids(layer_ids: Iterable[int], num_layers: int) -> None:
    """Refuse layers that do not exist, and the last one.

    Raises:
        ConfigError: naming the layers.
    """
    wrong = [layer for layer in layer_ids if not -1 <= layer < num_layers - 1]
    if wrong:
        what = f"layers {wrong} cannot be captured from a target of {num_layers} layers"
        if num_layers - 1 in wrong:
            what += "; the last layer's output is normed on some paths and raw on others, so training and decoding would disagree"
        raise ConfigError(what, where="target.layer_ids", fix=f"choose from -1 to {num_layers - 2}")
