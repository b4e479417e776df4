"""Loading the target: its config, its weights, the device, number format and attention kernel."""

import importlib.util
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from deepspec.config.target import TargetConfig
from deepspec.errors import ConfigError
from deepspec.target.chat import not_loaded
from deepspec.target.model import FLASH, Target, check_layer_ids

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def check_settings(settings: TargetConfig, text_config: Any) -> None:
    """Refuse layers and a mask token that the target does not have.

    Raises:
        ConfigError: naming the field.
    """
    check_layer_ids(settings.layer_ids, text_config.num_hidden_layers)
    vocabulary = text_config.vocab_size
    if settings.mask_token_id >= vocabulary:
        raise ConfigError(
            f"mask token {settings.mask_token_id} is outside the target's vocabulary of"
            f" {vocabulary} tokens",
            where="target.mask_token_id",
            fix=f"choose an unused token id from 0 to {vocabulary - 1}",
        )


def read_text_config(settings: TargetConfig, *, folder: Path | None) -> Any:
    """The language model's part of the target's config, without reading any weights.

    Raises:
        DataError: there is no such model.
    """
    from transformers import AutoConfig

    name = str(folder or settings.model)
    try:
        config = AutoConfig.from_pretrained(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise not_loaded("target", settings, error) from None
    return config.get_text_config()


def load_target(
    settings: TargetConfig,
    *,
    folder: Path | None,
    device: str = "auto",
    dtype: str | None = None,
    attention: Literal["sdpa", "fastest"] = "sdpa",
) -> Target:
    """The target from `folder`, or from the hub, in its own dtype unless another is given.

    `sdpa` takes the masks that decoding with a cache needs; `fastest` is flash-attention where it
    is installed.

    Raises:
        DataError: there is no such model, or it is not a causal language model.
        ConfigError: it lacks the layers or the mask token; found before any weight is read.
    """
    from transformers import AutoModelForCausalLM

    torch_device = choose_device(device)
    check_settings(settings, read_text_config(settings, folder=folder))
    torch_dtype = DTYPES[dtype or settings.dtype]
    kernel = attention_kernel(torch_device, torch_dtype) if attention == "fastest" else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder or settings.model),
            revision=settings.revision,
            dtype=torch_dtype,
            attn_implementation=kernel,
        )
    except (OSError, ValueError) as error:
        raise not_loaded("target", settings, error) from None
    log.info(
        "target=%s device=%s dtype=%s attention=%s layers=%s",
        settings.model,
        torch_device,
        torch_dtype,
        kernel,
        settings.layer_ids,
    )
    return Target(model.to(torch_device), settings.layer_ids)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """flash-attention for bfloat16 on a GPU where it is installed, else PyTorch's own."""
    fits = device.type == "cuda" and dtype == torch.bfloat16
    return FLASH if fits and importlib.util.find_spec("flash_attn") is not None else "sdpa"


def choose_device(device: str) -> torch.device:
    """The device of `resources.devices.type`: `auto` is the GPU if there is one.

    Raises:
        ConfigError: `cuda` on a machine without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            "there is no GPU here",
            where="resources.devices.type",
            fix="set resources.devices.type to auto or cpu",
        )
    return torch.device("cuda" if device != "cpu" and has_gpu else "cpu")
