"""The target model: loading it, and the one function that taps its hidden states.

Capture and evaluation both go through `Target.forward`, so a draft sees in decoding what it saw in
training. Layer l means the output of decoder layer l (0-based) before the final norm; -1 is the
embedding output. B batch, T tokens, m captured layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from deepspec.config.run import TargetConfig
from deepspec.errors import ConfigError, DataError
from deepspec.model.kv_cache import LayerCache

log = logging.getLogger(__name__)

FLASH = "flash_attention_2"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TargetOutput(NamedTuple):
    context: Tensor  # [B, T, m * D] the captured layers, side by side in ascending order
    # [B, T, D] after the final norm: lm_head(last_hidden[t]) predicts token t + 1
    last_hidden: Tensor


class TargetCache:
    """Keys and values of every layer with a length per row; taking a row back is lowering its
    length.

    Stands in for transformers' Cache: the attention layers call nothing but `update`.
    """

    def __init__(self, layers: Sequence[LayerCache], capacity: int, device: torch.device) -> None:
        self.layers, self.capacity = layers, capacity
        self.lengths = [0] * (layers[0].rows if layers else 0)
        # row t sees keys 0..t
        self.causal = torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril()
        self.positions = torch.arange(capacity, device=device)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].write(keys, values, self.lengths)

    def put(self, rows: Sequence[int], fresh: TargetCache) -> None:
        """Give these rows to other sequences, prefilled in a cache of their own."""
        for layer, of_fresh in zip(self.layers, fresh.layers, strict=True):
            layer.put(rows, of_fresh, max(fresh.lengths))
        for row, length in zip(rows, fresh.lengths, strict=True):
            self.lengths[row] = length

    def reset(self) -> None:
        """Forget all rows: what is written next overwrites them."""
        self.lengths = [0] * len(self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def step(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions [B, q] of the next `num_tokens` of each row, and which keys they see [B, 1,
        q, longest row + q].
        """
        longest = max(self.lengths) + num_tokens
        if min(self.lengths) + num_tokens == longest:
            start = longest - num_tokens
            return self.positions[start:longest][None], self.causal[start:longest, :longest][
                None, None
            ]
        starts = torch.tensor(self.lengths, device=self.positions.device)
        positions = starts[:, None] + self.positions[:num_tokens]
        return positions, self.causal[positions][:, None, :, :longest]


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


def check_settings(settings: TargetConfig, text_config: Any) -> None:
    """Refuse layers and a mask token that the target does not have, with a ConfigError."""
    check_layer_ids(settings.layer_ids, text_config.num_hidden_layers)
    if settings.mask_token_id >= text_config.vocab_size:
        what = f"mask token {settings.mask_token_id} is outside the target's vocabulary of {text_config.vocab_size} tokens"
        raise ConfigError(
            what,
            where="target.mask_token_id",
            fix=f"choose an unused token id from 0 to {text_config.vocab_size - 1}",
        )


def read_text_config(settings: TargetConfig, *, folder: Path | None) -> Any:
    """The language model's part of the target's config; no weight is read.

    Raises:
        DataError: no such model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(folder or settings.model), revision=settings.revision
        ).get_text_config()
    except (OSError, ValueError) as error:
        raise _unloadable(settings, error) from None


def load_target(
    settings: TargetConfig,
    *,
    folder: Path | None,
    device: str = "auto",
    dtype: str | None = None,
    attention: Literal["sdpa", "fastest"] = "sdpa",
) -> Target:
    """The target in its own dtype (or `dtype`) on the device asked for; `folder` where it is on
    this disk.

    `sdpa` takes the masks that decoding with a cache needs; `fastest` is flash-attention where it
    is installed.

    Raises:
        DataError: no such model, or not a causal language model.
        ConfigError: layers or a mask token that it does not have; found before any weight is read.
    """
    from transformers import AutoModelForCausalLM

    chosen = choose_device(device)
    check_settings(settings, read_text_config(settings, folder=folder))
    number_format = DTYPES[dtype or settings.dtype]
    kernel = attention_kernel(chosen, number_format) if attention == "fastest" else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder or settings.model),
            revision=settings.revision,
            dtype=number_format,
            attn_implementation=kernel,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(settings, error) from None
    log.info(
        "target=%s device=%s dtype=%s attention=%s layers=%s",
        settings.model,
        chosen,
        number_format,
        kernel,
        settings.layer_ids,
    )
    return Target(model.to(chosen), settings.layer_ids)


def attention_kernel(device: torch.device, number_format: torch.dtype) -> str:
    """flash-attention for half precision on a GPU where it is installed, else PyTorch's own."""
    fits = (
        device.type == "cuda"
        and number_format == torch.bfloat16
        and importlib.util.find_spec("flash_attn") is not None
    )
    return FLASH if fits else "sdpa"


def _unloadable(settings: TargetConfig, error: Exception) -> DataError:
    what = f"the target cannot be loaded: {str(error).splitlines()[0]}"
    return DataError(
        what, where=f"target.model {settings.model}", fix="check the name, or give a local folder"
    )


def choose_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one; asking for one that is not there is an error."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU here",
            where="resources.device",
            fix="set resources.device to auto or cpu",
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
