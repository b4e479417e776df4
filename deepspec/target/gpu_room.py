"""Whether a run's stages fit the memory of a GPU, by the arithmetic of `peak_memory`, and with
which settings they would.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple

import torch

from deepspec.artifacts.run import Run
from deepspec.config.families import HFConfig, family_of
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.formatting import human_bytes
from deepspec.model.memory import GPU_SHARE, free_bytes
from deepspec.target.chat import target_folder
from deepspec.target.device import choose_device
from deepspec.target.loading import read_text_config
from deepspec.target.peak_memory import StageMemory

log = logging.getLogger(__name__)

Stage = Literal["answers", "hidden", "train", "evaluate"]
BATCH_TOKENS = (8192, 4096, 2048, 1024)  # that are looked at, the largest that fits first


class TrainingFit(NamedTuple):
    """Settings of `resources.memory` with which training fits."""

    batch_tokens: int
    recompute: bool
    num_bytes: int  # peak

    @property
    def settings(self) -> str:
        """As `--set` takes them."""
        chosen = f"resources.memory.batch_tokens={self.batch_tokens}"
        return f"{chosen} resources.memory.recompute=true" if self.recompute else chosen


def fitting_training(stages: StageMemory, num_bytes: float, *, ranks: int) -> TrainingFit | None:
    """The fastest settings with which training takes at most so many bytes; None where none are.

    Layers are computed once more only where nothing fits otherwise.
    """
    most = max(BATCH_TOKENS[0], stages.memory.batch_tokens)
    sizes = sorted({most, stages.memory.batch_tokens, *BATCH_TOKENS}, reverse=True)
    for recompute in sorted({stages.memory.recompute, True}):
        for batch_tokens in sizes:
            tried = stages.with_memory(batch_tokens=batch_tokens, recompute=recompute)
            if (peak := tried.training(ranks)) <= num_bytes:
                return TrainingFit(batch_tokens, recompute, peak)
    return None


def fitting_rows(peak: Callable[[int], int], num_bytes: float) -> int:
    """The most rows that take at most so many bytes."""
    weights = peak(0)
    return max(0, int((num_bytes - weights) // (peak(1) - weights)))


def require_room(run: Run, stage: Stage) -> None:
    """Refuse a stage that loads the target and cannot fit; before any weight is read.

    Raises:
        ConfigError: as `require_room_for`, or the device cannot be used.
        TransientError: the GPU is in the hands of another process.
        DataError: there is no such model.
    """
    settings, of_target = run.config.resources.devices, run.config.target
    of_stage = run.config.evaluate.dtype if stage == "evaluate" else None
    device = choose_device(settings.type, dtype=of_stage or of_target.dtype)
    if device.type == "cuda":
        text = read_text_config(of_target, folder=target_folder(run))
        require_room_for(run.config, stage, device, target=text.to_dict())


def require_room_for(
    config: RunConfig,
    stage: Stage,
    device: torch.device,
    *,
    target: HFConfig,
    ranks: int = 1,
    compiled: bool = True,
) -> None:
    """Refuse a stage whose smallest pieces (in training, largest micro-batch) a GPU cannot hold.

    With `resources.checks.gpu_memory: warn` that is only logged. Of a CPU nothing is known.

    Args:
        config: The run's, whose settings count.
        stage: What is about to begin.
        device: Where it computes.
        target: The target's config.json.
        ranks: How many train together.
        compiled: Whether training compiles.

    Raises:
        ConfigError: what it needs, what is free, and what would fit.
    """
    if device.type != "cuda" or not _is_known(target):
        return
    stages = StageMemory(config, target, compiled)
    num_gpus = 1 if stage == "train" else config.resources.devices.gpus_per_lane
    free, needed = num_gpus * free_bytes(device), _needed(stages, stage, ranks)
    if needed <= free:
        return
    advice = _advice(stages, stage, free, ranks)
    error = ConfigError(
        f"the stage {stage} needs {human_bytes(needed)} of a GPU's memory by arithmetic, and "
        f"{human_bytes(free)} are free on {torch.cuda.get_device_name(device)}",
        where="resources.memory" if stage == "train" else "target.model",
        fix=f"{advice}; resources.checks.gpu_memory=warn begins anyway",
    )
    if config.resources.checks.gpu_memory == "refuse":
        raise error
    log.warning("stage=%s %s: %s", stage, error.what, error.fix)


def _is_known(target: HFConfig) -> bool:
    """Whether the target is of a family that the arithmetic knows; others can answer too."""
    with suppress(ConfigError):
        return bool(family_of(target))
    return False


def _needed(stages: StageMemory, stage: Stage, ranks: int) -> int:
    match stage:
        case "answers":
            return stages.answers(1)
        case "hidden":
            return stages.with_memory(batch_tokens=1).capture()
        case "evaluate":
            return stages.evaluation(1)
    return stages.training(ranks)


def _advice(stages: StageMemory, stage: Stage, free: float, ranks: int) -> str:
    """What to set so that the stage fits."""
    if stage == "train":
        return training_advice(stages, GPU_SHARE * free, ranks=ranks)
    enough = human_bytes(_needed(stages, stage, ranks) / GPU_SHARE)
    servers = ", or let servers answer (answers.engine=openai)" if stage == "answers" else ""
    return (
        "spread the target over several GPUs (resources.devices.gpus_per_lane), or use GPUs with "
        f"{enough} in all{servers}"
    )


def training_advice(stages: StageMemory, num_bytes: float, *, ranks: int) -> str:
    """What to set so that training takes at most so many bytes of each GPU."""
    if fit := fitting_training(stages, num_bytes, ranks=ranks):
        return f"set {fit.settings} (then {human_bytes(fit.num_bytes)})"
    config = stages.config
    smallest = stages.with_memory(batch_tokens=BATCH_TOKENS[-1], recompute=True).training(ranks)
    ways = [f"use a GPU with {human_bytes(smallest / GPU_SHARE)}"]
    if config.resources.training.source == "online":
        ways.append("read hidden states from a cache (resources.training.source=cache)")
    if config.train.strategy == "ddp":
        ways.append("deal the optimizer out to several GPUs (train.strategy=deepspeed)")
    ways.append(f"lower hidden.max_length (now {config.hidden.max_length})")
    return f"no resources.memory.batch_tokens fits: {', or '.join(ways)}"
