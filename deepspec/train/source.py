"""Which of the three sources a training reads: as `resources.training.source` says, but a sealed cache
is used where there is one.
"""

from __future__ import annotations

import logging

from deepspec.artifacts.missing import trains_without_cache
from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.cache.source import Source
from deepspec.hidden.online import open_online
from deepspec.hidden.rolling import open_rolling
from deepspec.process.events import Report
from deepspec.train.distributed import World
from deepspec.train.validation import acceptance_numbers, own_share

log = logging.getLogger(__name__)


def open_source(run: Run, world: World, report: Report) -> Source:
    """The source, ready to be asked for its index, its layout and held-out samples.

    Raises:
        ArtifactMismatch: the cache is to be read and not finished.
        FidelityTooLow: the codec loses more of the target's states than `resources.checks.fidelity`
            allows.
    """
    config = run.config
    resources = config.resources
    if not trains_without_cache(run):
        if resources.training.source != "cache":
            log.info(
                "stage=train the cache is sealed: it is read as it is, whatever resources.training.source says (%s)",
                resources.training.source,
            )
        return HiddenCache(
            run.artifact("hidden"),
            cache_gb=resources.storage.copies_gb,
            check_reads=resources.checks.reads,
        )
    if resources.training.source == "rolling":
        count = config.train.acceptance_samples
        return open_rolling(
            run,
            share=lambda index: own_share(acceptance_numbers(index, count), world),
            is_first=world.is_first,
            report=report,
        )
    return open_online(run, is_first=world.is_first, report=report)
