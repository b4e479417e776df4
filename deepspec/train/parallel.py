"""Which strategy a run trains with: `ddp`, or DeepSpeed's ZeRO."""

from collections.abc import Callable

from deepspec.artifacts.artifact import Artifact
from deepspec.config.draft import TrainConfig
from deepspec.config.resources import MemoryConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.train.ddp import Replicated
from deepspec.train.deepspeed_setup import load_deepspeed
from deepspec.train.distributed import World
from deepspec.train.strategy import Strategy
from deepspec.train.zero import Zero


def check_strategy(settings: TrainConfig, world: World) -> None:
    """Refuse, before anything is read, a strategy that is not installed.

    Raises:
        ConfigError: DeepSpeed is wanted and cannot be loaded.
    """
    if settings.strategy == "deepspeed":
        load_deepspeed(world.device)


def make_strategy(
    draft: Drafter,
    settings: TrainConfig,
    memory: MemoryConfig,
    world: World,
    *,
    artifact: Artifact,
    make_filler: Callable[[], TrainBatch],
) -> Strategy:
    """The strategy that `train.strategy` names, over this draft, with a fresh optimizer.

    Args:
        draft: The draft as it is now; its parts belong to the strategy afterwards.
        settings: The section `train`.
        memory: The section `resources.memory`.
        world: The ranks.
        artifact: Where DeepSpeed's configuration is written.
        make_filler: Gives a small batch with something to learn from, for ranks without one.
    """
    if settings.strategy == "ddp":
        return Replicated(draft, settings, world)
    return Zero(draft, settings, memory, world, filler=make_filler(), artifact=artifact)
