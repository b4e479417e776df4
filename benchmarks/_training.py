"""A training over a cache of random states, for the benchmarks that measure whole steps."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._measure import hidden_artifact, make_samples, raw_layout
from deepspec.cache.reader import HiddenCache
from deepspec.config.run import RunConfig
from deepspec.model.checkpoint import build_draft
from deepspec.model.execution import Execution, compiles
from deepspec.model.spec import DraftSpec
from deepspec.train.batches import StepData
from deepspec.train.checkpoint_clock import CheckpointClock
from deepspec.train.distributed import World
from deepspec.train.step import StepMetrics, Trainer
from deepspec.train.strategy import Replicated
from deepspec.train.throughput import Throughput
from tests.cache.samples import make_cache

SHARD_ROWS = 96
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "initializer_range": 0.02,
}
QWEN3_4B = QWEN3 | {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def random_cache(
    folder: Path, lengths: Mapping[int, int], *, hidden_size: int, layers: int = 5
) -> HiddenCache:
    """Random states of samples of these lengths in tokens (length: how many), mixed over the
    shards.
    """
    layout = raw_layout(layers=layers, hidden_size=hidden_size)
    samples = [
        sample
        for num_tokens, count in lengths.items()
        for sample in make_samples(count, num_tokens, layout)
    ]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [samples[place]._replace(sample_id=number) for number, place in enumerate(order)]
    shards = [mixed[start : start + SHARD_ROWS] for start in range(0, len(mixed), SHARD_ROWS)]
    return HiddenCache(make_cache(hidden_artifact(folder), shards, layout))


def make_trainer(
    config: RunConfig, cache: HiddenCache, target: Mapping[str, Any], device: torch.device
) -> Trainer:
    """A fresh draft of random weights for a target with this config.json, ready for its first
    step.
    """
    ids = {"layer_ids": config.target.layer_ids, "mask_token_id": config.target.mask_token_id}
    spec = DraftSpec.from_target(target, config.draft, **ids)
    frozen = (
        torch.randn(spec.vocab_size, spec.hidden_size, generator=torch.Generator().manual_seed(0))
        * spec.hidden_size**-0.5
    )
    draft = build_draft(spec, embed=frozen, lm_head=frozen, seed=0).to(device)
    draft.configure_loss(config.loss)
    draft.execution = Execution(compile=compiles(config, device))
    world = World(0, 1, device)
    strategy = Replicated(draft, config.train, world)
    data = StepData(cache, config, world)
    return Trainer(
        settings=config.train,
        artifact=cache.artifact,
        inputs={},
        world=world,
        data=data,
        strategy=strategy,
        metrics=StepMetrics(),
        throughput=Throughput(device, first=0, total=data.total_steps),
        clock=CheckpointClock(None, num_bytes=0, runner=config.resources.runner),
        stop=threading.Event(),
    )
