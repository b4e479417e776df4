"""Which strategy a run trains with: `ddp`, or DeepSpeed's ZeRO where `train.strategy` asks for
it.
"""

from __future__ import annotations

from collections.abc import Callable

from deepspec.artifacts.artifact import Artifact
from deepspec.config.run import RunConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.train.ddp import Replicated
from deepspec.train.distributed import World
from deepspec.train.strategy import Strategy
from deepspec.train.zero import Zero, load_deepspeed


def check_strategy(config: RunConfig, world: World) -> None:
    """See to it, before anything is read, that `train.strategy` can be had.

    Raises:
        ConfigError: DeepSpeed is asked for, and is not installed.
    """
    if config.train.strategy == "deepspeed":
        load_deepspeed(world.device)


def make_strategy(
    config: RunConfig,
    artifact: Artifact,
    world: World,
    *,
    draft: Drafter,
    filler: Callable[[], TrainBatch],
) -> Strategy:
    """The one that `train.strategy` names, with the draft as it is now and an optimizer that has
    not begun.

    `filler` gives any small batch with something to learn from: what a rank without one of its own
    goes through.
    """
    if config.train.strategy == "ddp":
        return Replicated(draft, config.train, world)
    return Zero(config, artifact, world, draft=draft, filler=filler())
