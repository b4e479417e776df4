"""Which source of hidden states is cheapest for a run: what each puts on the disk, how often it
captures, and whether it fits.

GPU hours are of all GPUs together, hours are wall-clock on those that the plan was made for. All
units are decimal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from deepspec.config.run import RunConfig
from deepspec.formatting import human_bytes, human_hours
from deepspec.plan.arithmetic import Fit, Number

SourceName = Literal["cache", "rolling", "online"]


class Effort(NamedTuple):
    """What a run takes, from which each source's share follows."""

    cache_bytes: float  # of the whole cache
    missing_bytes: float  # of what is not committed yet, with what stands beside the shards
    beside_bytes: float
    shard_bytes: float
    num_shards: int
    capture_hours: float  # one pass over all samples on all lanes
    capture_hours_left: float
    train_hours: float
    passes: float
    lanes: int
    device: str


class SourceOption(NamedTuple):
    name: SourceName
    num_bytes: float  # on the disk at most
    captures: float  # passes of the target over the samples
    capture_gpu_hours: float
    hours: float  # until the draft is trained
    fits: bool | None  # None where the size of the whole is not known


class SourcesPart(NamedTuple):
    options: tuple[SourceOption, ...]
    chosen: SourceName
    best: SourceName
    reason: str

    def option(self, name: SourceName) -> SourceOption:
        return next(option for option in self.options if option.name == name)


def compare_sources(
    config: RunConfig, effort: Effort, *, room: Callable[[float], Fit] | None
) -> SourcesPart:
    """The three sources side by side, and the one of those that fit which takes the fewest GPU
    hours of capture.
    """
    options = tuple(
        option._replace(fits=room(option.num_bytes).fits if room else None)
        for option in (_cache(effort), _rolling(config, effort), _online(config, effort))
    )
    chosen: SourceName = "cache" if not effort.missing_bytes else config.resources.training.source
    fitting = [option for option in options if option.fits is not False] or [options[-1]]
    # Of equal ones the first: what a cache holds serves the next draft too, and nothing on a disk
    # is simpler than something.
    best = min(
        fitting,
        key=lambda option: (
            option.capture_gpu_hours,
            ("cache", "online", "rolling").index(option.name),
        ),
    )
    return SourcesPart(options, chosen, best.name, _reason(config, best, options))


def count_passes(config: RunConfig, samples: float) -> Number:
    steps, epochs = config.train.max_steps, float(config.train.epochs)
    by_steps = (steps or 0) * config.train.global_batch / max(samples, 1)
    return (
        Number(by_steps, "train.max_steps")
        if steps and by_steps < epochs
        else Number(epochs, "train.epochs")
    )


def _cache(effort: Effort) -> SourceOption:
    left = effort.capture_hours_left
    share = left / effort.capture_hours if effort.capture_hours else 0.0
    return SourceOption(
        "cache", effort.missing_bytes, share, left * effort.lanes, left + effort.train_hours, None
    )


def _rolling(config: RunConfig, effort: Effort) -> SourceOption:
    """Capture has GPUs of its own where there are enough: then the slower of the two decides.
    What fits as a whole is never deleted.
    """
    resources, captures = config.resources, effort.passes / config.train.window_epochs
    if effort.cache_bytes <= resources.training.rolling_gb * 1e9:
        captures = min(captures, 1.0)
    gpu_hours, own = captures * effort.capture_hours * effort.lanes, resources.training.rolling_gpus
    if effort.device != "cpu" and 0 < own < effort.lanes:
        hours = max(gpu_hours / own, effort.train_hours * effort.lanes / (effort.lanes - own))
    else:
        hours = gpu_hours / effort.lanes + effort.train_hours
    window = min(2 * config.train.window_shards, effort.num_shards) * effort.shard_bytes
    held = max(window, min(resources.training.rolling_gb * 1e9, effort.cache_bytes))
    return SourceOption("rolling", held + effort.beside_bytes, captures, gpu_hours, hours, None)


def _online(config: RunConfig, effort: Effort) -> SourceOption:
    """Only training samples go through the target, but in every pass."""
    captures = effort.passes * (1 - config.prompts.held_out)
    hours = captures * effort.capture_hours
    return SourceOption(
        "online",
        effort.beside_bytes,
        captures,
        hours * effort.lanes,
        hours + effort.train_hours,
        None,
    )


def _reason(config: RunConfig, best: SourceOption, options: tuple[SourceOption, ...]) -> str:
    cache = options[0]
    if best.name == "cache":
        return "it captures each sample once, it fits, and the next draft of this target reads it again"
    why_not = f"the cache needs {human_bytes(cache.num_bytes)}, which do not fit"
    if cache.fits is not False:
        why_not = f"the cache takes {human_hours(cache.capture_gpu_hours)} of capture, more than this run looks at"
    if best.name == "online":
        return f"{why_not}; nothing is written, the target must fit into memory beside the draft"
    return f"{why_not}; with train.window_epochs {config.train.window_epochs} a shard is captured once in as many passes, online in each"
