"""Which source of hidden states is cheapest for a run: its bytes, its captures, whether it fits.

GPU hours are of all GPUs together, hours are wall-clock on those that the plan was made for. All
units are decimal.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from deepspec.config.draft import TrainConfig
from deepspec.config.resources import TrainingConfig
from deepspec.formatting import human_bytes, human_hours
from deepspec.plan.arithmetic import Fit, Number

SourceName = Literal["cache", "rolling", "online"]


class Effort(NamedTuple):
    """What a run takes, from which each source's share follows."""

    cache_bytes: float  # of the whole cache
    missing_bytes: float  # of what is not committed yet, with the embedding and lm_head
    once_bytes: float  # of embedding and lm_head
    shard_bytes: float
    num_shards: int
    capture_hours: float  # one pass over all samples on all lanes
    capture_hours_left: float
    train_hours: float
    passes: float
    lanes: int
    device: str


class SourceOption(NamedTuple):
    """What one source takes."""

    name: SourceName
    num_bytes: float  # on the disk at most
    captures: float  # passes of the target over the samples
    capture_gpu_hours: float
    hours: float  # until the draft is trained
    fits: bool | None = None  # None where the size of the whole is not known


class SourcesPart(NamedTuple):
    """The sources compared, the one that the run has, and the cheapest."""

    options: tuple[SourceOption, ...]
    chosen: SourceName
    best: SourceName
    reason: str

    def option(self, name: SourceName) -> SourceOption:
        """One of the sources by its name."""
        return next(option for option in self.options if option.name == name)


def compare_sources(
    effort: Effort,
    train: TrainConfig,
    settings: TrainingConfig,
    *,
    held_out: float,
    room: Callable[[float], Fit] | None,
) -> SourcesPart:
    """The three sources side by side, and of those that fit the one with the fewest GPU hours of
    capture.
    """
    options = tuple(
        option._replace(fits=room(option.num_bytes).fits if room else None)
        for option in (_cache(effort), _rolling(effort, train, settings), _online(effort, held_out))
    )
    chosen: SourceName = settings.source if effort.missing_bytes else "cache"
    fitting = [option for option in options if option.fits is not False] or [options[-1]]
    # Of equal ones the first here: what a cache holds serves the next draft too, and nothing on a
    # disk is simpler than something.
    preferred = ("cache", "online", "rolling")
    best = min(fitting, key=lambda each: (each.capture_gpu_hours, preferred.index(each.name)))
    return SourcesPart(options, chosen, best.name, _reason(best, options[0], train.window_epochs))


def count_passes(train: TrainConfig, samples: float) -> Number:
    """Passes over so many samples until training ends."""
    by_steps = (train.max_steps or 0) * train.global_batch / max(samples, 1)
    if train.max_steps and by_steps < train.epochs:
        return Number(by_steps, "train.max_steps")
    return Number(float(train.epochs), "train.epochs")


def _cache(effort: Effort) -> SourceOption:
    left = effort.capture_hours_left
    return SourceOption(
        name="cache",
        num_bytes=effort.missing_bytes,
        captures=left / effort.capture_hours if effort.capture_hours else 0.0,
        capture_gpu_hours=left * effort.lanes,
        hours=left + effort.train_hours,
    )


def _rolling(effort: Effort, train: TrainConfig, settings: TrainingConfig) -> SourceOption:
    """Where there are enough GPUs some only capture: then the slower of the two sides decides.

    A cache that fits into `rolling_gb` as a whole is captured once.
    """
    allowed, captures = settings.rolling_gb * 1e9, effort.passes / train.window_epochs
    if effort.cache_bytes <= allowed:
        captures = min(captures, 1.0)
    gpu_hours, own = captures * effort.capture_hours * effort.lanes, settings.rolling_gpus
    if effort.device != "cpu" and 0 < own < effort.lanes:
        hours = max(gpu_hours / own, effort.train_hours * effort.lanes / (effort.lanes - own))
    else:
        hours = gpu_hours / effort.lanes + effort.train_hours
    windows = min(2 * train.window_shards, effort.num_shards) * effort.shard_bytes
    held = max(windows, min(allowed, effort.cache_bytes))
    return SourceOption("rolling", held + effort.once_bytes, captures, gpu_hours, hours)


def _online(effort: Effort, held_out: float) -> SourceOption:
    """Only training samples go through the target, but in every pass."""
    captures = effort.passes * (1 - held_out)
    hours = captures * effort.capture_hours
    return SourceOption(
        name="online",
        num_bytes=effort.once_bytes,
        captures=captures,
        capture_gpu_hours=hours * effort.lanes,
        hours=hours + effort.train_hours,
    )


def _reason(best: SourceOption, cache: SourceOption, window_epochs: int) -> str:
    if best.name == "cache":
        return "it captures each sample once, it fits, and the next draft of this target can use it"
    if cache.fits is False:
        why = f"the cache needs {human_bytes(cache.num_bytes)}, which do not fit"
    else:
        hours = human_hours(cache.capture_gpu_hours)
        why = f"the cache takes {hours} of capture, more than this run needs"
    if best.name == "online":
        return f"{why}; nothing is written, the target must fit into memory with the draft"
    return f"{why}; a shard is captured once in train.window_epochs {window_epochs}, online in each"
