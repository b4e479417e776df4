"""Which source of hidden states is cheapest for a run: its bytes, its captures, whether it fits."""

from deepspec.config.run import RunConfig
from deepspec.formatting import human_bytes, human_hours
from deepspec.plan.parts import (
    CapturePart,
    Facts,
    Fit,
    SizePart,
    SourceName,
    SourceOption,
    SourcesPart,
    TrainingPart,
)


def fit_of(config: RunConfig, facts: Facts, num_bytes: float) -> Fit | None:
    """Whether so many bytes fit into the store; None where the number of prompts is not known."""
    if facts.work.prompts is None:
        return None
    return Fit(num_bytes, facts.free_bytes, config.resources.storage.min_free_gb * 1e9)


def compare_sources(
    config: RunConfig, facts: Facts, *, size: SizePart, capture: CapturePart, training: TrainingPart
) -> SourcesPart:
    """The three sources side by side, and of those that fit the one with the fewest GPU hours of
    capture.
    """
    train, settings, lanes = config.train, config.resources.training, facts.lanes
    allowed, rounds = settings.rolling_gb * 1e9, training.passes / train.window_epochs
    if size.num_bytes <= allowed:  # nothing is used up before it is read again
        rounds = min(rounds, 1.0)
    windows = min(2 * train.window_shards, size.shards) * size.shard_bytes
    held = max(windows, min(allowed, size.num_bytes))
    takes: dict[SourceName, tuple[float, float]] = {
        "cache": (size.missing_bytes, facts.missing),
        "rolling": (held + size.frozen_bytes, rounds),
        # Only training samples go through the target, but in every pass.
        "online": (size.frozen_bytes, training.passes * (1 - config.prompts.held_out)),
    }  # bytes, and passes of the target
    options = []
    for name, (num_bytes, captures) in takes.items():
        gpu_hours = captures * capture.hours * lanes
        hours, own = captures * capture.hours + training.hours, settings.rolling_gpus
        if name == "rolling" and facts.speed.device != "cpu" and 0 < own < lanes:
            # Some GPUs only capture: the slower of the two sides decides.
            hours = max(gpu_hours / own, training.hours * lanes / (lanes - own))
        fit = fit_of(config, facts, num_bytes)
        fits = fit and fit.fits
        options.append(SourceOption(name, float(num_bytes), captures, gpu_hours, hours, fits))
    fitting = [option for option in options if option.fits is not False] or options[-1:]
    # Of equal ones the first here: what a cache holds serves the next draft too, and nothing on a
    # disk is simpler than something.
    preferred = ("cache", "online", "rolling")
    best = min(fitting, key=lambda each: (each.capture_gpu_hours, preferred.index(each.name)))
    chosen = settings.source if facts.missing else "cache"
    reason = _reason(best, options[0], train.window_epochs)
    return SourcesPart(tuple(options), chosen, best.name, reason)


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
