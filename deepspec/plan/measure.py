"""What this machine can do: the speed of the target's layers, of the store, and the draft's size.

No weight of the target is read: time does not depend on their values. B batch, T tokens.
"""

import copy
import logging
import os
import time
import uuid
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from deepspec.config.draft import DraftConfig
from deepspec.config.resources import DevicesConfig
from deepspec.config.target import TargetConfig
from deepspec.errors import DataError, StoreError
from deepspec.model.checkpoint import empty_draft
from deepspec.model.spec import DraftSpec
from deepspec.plan.parts import Speed
from deepspec.storage.store import Store

log = logging.getLogger(__name__)

SMALL_VOCABULARY = 1024  # rows of the embedding in the model that is timed
TIMED_LAYERS = 3  # against one: the difference is what a layer costs
MAX_CPU_TOKENS = 2048
SECONDS_PER_DEPTH = 3.0
PROBE_TOKENS = 16
NOISE = 1 << 20  # values that weights are filled with, again and again
STORE_PROBE_BYTES = 128_000_000


def measure_speed(
    text_config: Any, *, dtype: torch.dtype, device: torch.device, batch_tokens: int, length: int
) -> Speed:
    """The target's speed: a few of its layers with random weights are timed, and scaled to all.

    A pass is at most `batch_tokens`, of samples of about `length`.

    Raises:
        DataError: not an architecture that can be built.
    """
    num_layers = text_config.num_hidden_layers
    timed = min(TIMED_LAYERS, num_layers)
    model = _shallow(text_config, timed, dtype, device)
    layers = model.layers
    per_layer = sum(parameter.numel() for parameter in layers.parameters()) / timed
    budget = min(batch_tokens, MAX_CPU_TOKENS) if device.type == "cpu" else batch_tokens
    length = max(1, min(length, budget, text_config.max_position_embeddings))
    affordable = _affordable_tokens(model, device)
    rows = max(1, min(budget, affordable) // length)
    ids = torch.randint(SMALL_VOCABULARY, (rows, min(length, affordable)), device=device)
    deep = _seconds(model, ids)
    model.layers = layers[:1]
    shallow = _seconds(model, ids)
    slope = (deep - shallow) / max(timed - 1, 1)
    if slope <= 0:  # a layer too small to be seen in the noise
        slope = deep / timed
    tokens_per_s = ids.numel() / (shallow + slope * (num_layers - 1))
    speed = Speed(tokens_per_s, 2 * per_layer * ids.numel() / slope, device.type, ids.numel())
    log.info("measured tokens_per_s=%.0f flops_per_s=%.3g device=%s tokens=%d", *speed)
    return speed


def _shallow(text_config: Any, num_layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The target's decoder with a few layers, a small vocabulary and weights of noise."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(text_config)
    config.num_hidden_layers, config.vocab_size = num_layers, SMALL_VOCABULARY
    config.pad_token_id = None  # it may lie beyond this vocabulary
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types[: num_layers - 1], config.layer_types[-1]]
    try:
        # Weights are filled below: drawing a billion normal values would take longer than timing
        # them.
        with no_init_weights():
            model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        raise DataError(
            f"a model of type {config.model_type!r} cannot be built: {str(error).splitlines()[0]}",
            where="target.model",
            fix="use a target that Transformers knows",
        ) from None
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(NOISE, generator=generator) * 0.02).to(device, dtype)
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.view(-1).split(NOISE):
                piece.copy_(noise[: len(piece)])
    return model.eval().requires_grad_(requires_grad=False)


def _affordable_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens of a pass that leave time for a second one: few for a large target on a CPU."""
    probe = torch.randint(SMALL_VOCABULARY, (1, PROBE_TOKENS), device=device)
    return max(PROBE_TOKENS, int(PROBE_TOKENS * SECONDS_PER_DEPTH / 2 / _seconds(model, probe)))


@torch.inference_mode()
def _seconds(model: nn.Module, ids: Tensor) -> float:
    """The median time of a forward pass over `ids` [B, T], after one that loads kernels."""
    timer = Timer(
        "model(input_ids=ids, use_cache=False)",
        globals={"model": model, "ids": ids},
        num_threads=torch.get_num_threads(),
    )
    return float(timer.blocked_autorange().median)


def num_lanes(devices: DevicesConfig, device: str) -> int:
    """Lanes that add up: one per GPU (or `gpus_per_lane` of them), or as set; on a CPU they would
    share what one was timed with.
    """
    if device == "cpu":
        return 1
    return devices.lanes or max(1, torch.cuda.device_count() // devices.gpus_per_lane)


def measure_store(store: Store) -> float | None:
    """Bytes a second that the store takes; None where there is no room to try.

    Raises:
        StoreError: writing fails.
    """
    if store.free_bytes() < 4 * STORE_PROBE_BYTES:
        return None
    name, data = f".probe-{uuid.uuid4().hex}", os.urandom(STORE_PROBE_BYTES // 16) * 16
    started = time.perf_counter()
    try:
        store.write(name, data)
        seconds = time.perf_counter() - started
        store.remove(name)
    except OSError as error:
        raise StoreError(
            f"cannot write: {error}", where=f"store {store.url}", fix="choose another with --store"
        ) from None
    return len(data) / seconds


def draft_parameters(target: TargetConfig, draft: DraftConfig, text_config: Any) -> int:
    """Trainable parameters of a draft.

    Raises:
        ConfigError: a target for which no draft is known.
    """
    spec = DraftSpec.from_target(
        text_config.to_dict(), draft, layer_ids=target.layer_ids, mask_token_id=target.mask_token_id
    )
    parameters = empty_draft(spec).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
