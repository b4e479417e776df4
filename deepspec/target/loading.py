"""Loading the target: its config, its weights, the device, number format and attention kernel."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from deepspec.config.target import TargetConfig
from deepspec.errors import ConfigError, DataError
from deepspec.target.model import FLASH, Target, check_layer_ids

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
            where="resources.devices.type",
            fix="set resources.devices.type to auto or cpu",
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
