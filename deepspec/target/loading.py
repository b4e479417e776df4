"""Loading the target: its config, its weights, the device, number format and attention kernel."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch

from deepspec.config.target import TargetConfig
from deepspec.errors import ConfigError, DataError, OutOfMemory
from deepspec.model.memory import naming_oom
from deepspec.target.attention import use_flash_attention
from deepspec.target.chat import loading
from deepspec.target.device import check_placement, choose_device, placement
from deepspec.target.examine import examine
from deepspec.target.model import Target, listed_ids

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def check_settings(settings: TargetConfig, text_config: Any) -> None:
    """Refuse layers and a mask token that the target does not have, and its last layer.

    The last layer's output is normed on some paths and raw on others, so that training and decoding
    would disagree.

    Raises:
        ConfigError: naming the field.
    """
    num_layers, vocabulary = text_config.num_hidden_layers, text_config.vocab_size
    wrong = [layer for layer in settings.layer_ids if layer > num_layers - 2]
    if wrong:
        what = f"layers {wrong} cannot be captured from a target of {num_layers} layers"
        if num_layers - 1 in wrong:
            what += "; the last layer's output is normed on some paths and raw on others"
        raise ConfigError(what, where="target.layer_ids", fix=f"choose from -1 to {num_layers - 2}")
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
    return _read_config(settings, folder=folder).get_text_config()


def _read_config(settings: TargetConfig, *, folder: Path | None) -> Any:
    from transformers import AutoConfig

    name = str(folder or settings.model)
    with loading("target", settings):
        return AutoConfig.from_pretrained(name, revision=settings.revision)


def _model_class(config: Any) -> Any:
    """The class of transformers that loads it: of causal models, or else of those that read images
    as well, whose text part is the target.

    Raises:
        ConfigError: there is none.
    """
    import transformers

    encodes = getattr(config, "is_encoder_decoder", False)
    # encoders such as BERT's are decoders only where their config has it set
    encodes = encodes or getattr(config, "is_decoder", True) is False
    if not encodes and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if not encodes and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise ConfigError(
        f"a model of type {config.model_type} is not a causal language model",
        where="target.model",
        fix="choose a decoder-only model; encoders and encoder-decoders cannot be targets",
    )


def _check_weights(model: Any, missing: Collection[str], settings: TargetConfig) -> None:
    if missing:
        raise DataError(
            f"{len(missing)} weights of {type(model).__name__} are missing: {min(missing)}, ...",
            where=f"target.model {settings.model}",
            fix="give a folder with all weights of a causal language model, its lm_head included",
        )


def read_eos_ids(settings: TargetConfig, *, folder: Path | None) -> list[int]:
    """Token ids that end an answer, according to the target's files, as `Target.eos_ids`.

    Raises:
        DataError: there is no such model.
    """
    from transformers import AutoConfig, GenerationConfig

    name, revision = str(folder or settings.model), settings.revision
    with loading("target", settings):
        try:
            found = GenerationConfig.from_pretrained(name, revision=revision)
        except OSError:  # it has no generation_config.json
            config = AutoConfig.from_pretrained(name, revision=revision)
            found = GenerationConfig.from_model_config(config)
    return listed_ids(found.eos_token_id)


def load_target(
    settings: TargetConfig,
    *,
    folder: Path | None,
    device: str = "auto",
    num_gpus: int = 1,
    dtype: str | None = None,
    attention: Literal["sdpa", "fastest"] = "sdpa",
) -> Target:
    """The target from `folder`, or from the hub, in its own dtype unless another is given.

    Its weights go from the file to the device one by one: the host never holds them all. `fastest`
    is flash-attention for bfloat16 on a GPU where it works; `sdpa` takes the masks that decoding
    with a cache needs. On GPUs its layers are spread over `num_gpus`.

    Raises:
        DataError: there is no such model, or some of its weights are missing.
        ConfigError: it is not a causal language model, it lacks the layers or the mask token, or
            the device cannot be used, all found before any weight is read; or its layers or logits
            are not what the model computes.
        OutOfMemory: its weights do not fit.
    """
    torch_device = choose_device(device, dtype=dtype or settings.dtype)
    config = _read_config(settings, folder=folder)
    check_settings(settings, config.get_text_config())
    model_class = _model_class(config)
    torch_dtype = DTYPES[dtype or settings.dtype]
    too_large = OutOfMemory(
        f"the target does not fit into the memory of {num_gpus} x {torch_device}",
        where=f"target.model {settings.model}",
        fix="spread it over several (resources.devices.gpus_per_lane), see who else uses the"
        " device (nvidia-smi), or take one with more memory",
    )
    with loading("target", settings), naming_oom(too_large):
        model, info = model_class.from_pretrained(
            str(folder or settings.model),
            revision=settings.revision,
            dtype=torch_dtype,
            attn_implementation="eager",  # all have it; `Target` and `examine` choose
            output_loading_info=True,
            **placement(torch_device, num_gpus),
        )
    _check_weights(model, info["missing_keys"], settings)
    check_placement(model, num_gpus)
    if attention == "fastest":
        use_flash_attention(model.get_decoder(), torch_device, torch_dtype)
    target = Target(model, settings.layer_ids)
    with naming_oom(too_large):
        examine(target)
    log.info(
        "target=%s device=%s dtype=%s attention=%s logit_factor=%g layers=%s",
        settings.model,
        torch_device,
        torch_dtype,
        target.kernel,
        target.logit_factor,
        settings.layer_ids,
    )
    return target
