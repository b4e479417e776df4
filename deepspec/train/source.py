"""Which of the three sources a training reads: as `resources.training.source` says, but a sealed cache
is used where there is one.
"""

from __future__ import annotations

import logging

from deepspec.artifacts.lineage import artifact_of
from deepspec.artifacts.status import trains_without_cache
from deepspec.cache.reader import HiddenCache
from deepspec.cache.source import Source
from deepspec.config.run import RunConfig
from deepspec.hidden.online import open_online
from deepspec.hidden.rolling import open_rolling
from deepspec.process.events import Report
from deepspec.train.distributed import World
from deepspec.train.validation import acceptance_numbers, own_share

log = logging.getLogger(__name__)


def open_source(config: RunConfig, world: World, report: Report) -> Source:
    """The source, ready to be asked for its index, its layout and held-out samples.

    Raises:
        ArtifactMismatch: the cache is to be read and not finished.
        FidelityTooLow: the codec loses more of the target's states than `resources.checks.fidelity`
            allows.
    """
    resources = config.resources
    if not trains_without_cache(config):
        if resources.training.source != "cache":
            log.info(
                "stage=train the cache is sealed: it is read as it is, whatever resources.training.source says (%s)",
                resources.training.source,
            )
        return HiddenCache(
            artifact_of(config, "hidden"),
            cache_gb=resources.storage.copies_gb,
            check_reads=resources.checks.reads,
        )
    if resources.training.source == "rolling":
        count = config.train.acceptance_samples
        return open_rolling(
            config,
            share=lambda index: own_share(acceptance_numbers(index, count), world),
            is_first=world.is_first,
            report=report,
        )
    return open_online(config, is_first=world.is_first, report=report)
