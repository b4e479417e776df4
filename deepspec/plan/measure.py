"""What this machine can do: how fast it runs the target's layers, how fast the store takes bytes,
how large the draft is.

No weight of the target is read: time does not depend on their values. B batch, T tokens.
"""

from __future__ import annotations

import copy
import logging
import os
import statistics
import time
import uuid
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.config.run import RunConfig
from deepspec.errors import DataError, StoreError
from deepspec.model.checkpoint import empty_draft
from deepspec.model.spec import DraftSpec
from deepspec.plan.forecast import Speed
from deepspec.storage.store import Store
from deepspec.target.loading import DTYPES, choose_device

log = logging.getLogger(__name__)

SMALL_VOCABULARY = 1024  # rows of the embedding in the model that is timed
DEPTHS = (3, 1)  # decoder layers timed; their difference is what a layer costs
MAX_CPU_TOKENS = 2048
SECONDS_PER_DEPTH = 3.0
MAX_REPEATS = 8
PROBE_TOKENS = 16
NOISE = 1 << 20  # values that weights are filled with, again and again
STORE_PROBE_BYTES = 128_000_000


def measure_speed(config: RunConfig, text_config: Any, *, median_tokens: int) -> Speed:
    """Time a few decoder layers of the target's shape with random weights, and scale to all of
    them.

    Raises:
        DataError: not an architecture that can be built.
        ConfigError: the device asked for is not there.
    """
    device = choose_device(config.resources.devices.type)
    depths = [min(depth, text_config.num_hidden_layers) for depth in DEPTHS]
    model = _shallow(text_config, max(depths), DTYPES[config.target.dtype], device)
    layers = model.get_submodule("layers")
    per_layer = sum(parameter.numel() for parameter in layers.parameters()) / len(layers)
    budget = min(
        config.resources.memory.batch_tokens,
        MAX_CPU_TOKENS if device.type == "cpu" else config.resources.memory.batch_tokens,
    )
    length = max(1, min(median_tokens, budget, text_config.max_position_embeddings))
    affordable = _affordable_tokens(model, device)
    rows = max(1, min(budget, affordable) // length)
    ids = torch.randint(SMALL_VOCABULARY, (rows, min(length, affordable)), device=device)
    deep = _seconds(model, ids)
    model.layers = layers[: depths[1]]
    shallow = _seconds(model, ids)
    slope = (deep - shallow) / max(depths[0] - depths[1], 1)
    if slope <= 0:  # a layer so small that it drowns in the noise
        slope = deep / depths[0]
    seconds = shallow + slope * (text_config.num_hidden_layers - depths[1])
    speed = Speed(
        ids.numel() / seconds, 2 * per_layer * ids.numel() / slope, device.type, ids.numel()
    )
    log.info("measured tokens_per_s=%.0f flops_per_s=%.3g device=%s tokens=%d", *speed)
    return speed


def _shallow(text_config: Any, num_layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The target's decoder with a few layers, a small vocabulary and weights of noise."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(text_config)
    config.num_hidden_layers, config.vocab_size = num_layers, SMALL_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types[: num_layers - 1], config.layer_types[-1]]
    try:
        # Weights are filled below: drawing a billion normal values would take longer than timing
        # them.
        with no_init_weights():
            model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").to(
                device
            )
    except ValueError as error:
        what = (
            f"a model of type {config.model_type!r} cannot be built: {str(error).splitlines()[0]}"
        )
        raise DataError(
            what, where="target.model", fix="use a target that Transformers knows"
        ) from None
    noise = (torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) * 0.02).to(
        device, dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.view(-1).split(NOISE):
                piece.copy_(noise[: len(piece)])
    return model.eval().requires_grad_(requires_grad=False)


def _affordable_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens of a pass that leave time for a second one; a large target on a CPU gets through
    only a few.
    """
    probe = torch.randint(SMALL_VOCABULARY, (1, PROBE_TOKENS), device=device)
    _pass_seconds(model, probe)  # the first one also loads kernels
    return max(
        PROBE_TOKENS, int(PROBE_TOKENS * SECONDS_PER_DEPTH / 2 / _pass_seconds(model, probe))
    )


def _seconds(model: nn.Module, ids: Tensor) -> float:
    """The median time of a forward pass over `ids` [B, T]."""
    times = [_pass_seconds(model, ids)]
    while len(times) < MAX_REPEATS and sum(times) < SECONDS_PER_DEPTH:
        times.append(_pass_seconds(model, ids))
    return statistics.median(times[1:] or times)


@torch.inference_mode()
def _pass_seconds(model: nn.Module, ids: Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - started


def num_lanes(config: RunConfig, device: str) -> int:
    """Lanes that add up: one per GPU as the flows deal them out; on a CPU they would share what
    one was timed with.
    """
    if device == "cpu":
        return 1
    return config.resources.devices.lanes or max(1, torch.cuda.device_count())


def measure_store(store: Store) -> float | None:
    """Bytes a second that the store takes; None where there is no room to try.

    Raises:
        StoreError: writing fails.
    """
    if store.free_bytes() < 4 * STORE_PROBE_BYTES:
        return None
    name, block = f".probe-{uuid.uuid4().hex}", os.urandom(STORE_PROBE_BYTES // 16)
    data = block * 16
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


def draft_parameters(config: RunConfig, text_config: Any) -> int:
    """Trainable parameters of the run's draft.

    Raises:
        ConfigError: a target for which no draft is known.
    """
    layers, mask = config.target.layer_ids, config.target.mask_token_id
    draft = empty_draft(
        DraftSpec.from_target(
            text_config.to_dict(), config.draft, layer_ids=layers, mask_token_id=mask
        )
    )
    return sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)
