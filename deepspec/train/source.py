"""Which source of hidden states a training reads; another one is added here.

A sealed cache is read where there is one, whatever `resources.training.source` is.
"""

import logging

from deepspec.artifacts.missing import trains_without_cache
from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.cache.source import Source
from deepspec.hidden.online import open_online
from deepspec.hidden.rolling import open_rolling
from deepspec.process.events import Report
from deepspec.train.distributed import World
from deepspec.train.validation import acceptance_numbers

log = logging.getLogger(__name__)


def open_source(run: Run, world: World, report: Report) -> Source:
    """The source, its index, its layout and its held-out samples ready to be read.

    Raises:
        ArtifactMismatch: the cache is to be read and not finished.
        FidelityTooLow: the codec loses more of the target's states than
            `resources.checks.fidelity` allows.
    """
    resources, kind = run.config.resources, run.config.resources.training.source
    if not trains_without_cache(run):
        if kind != "cache":
            log.info("stage=train the cache is sealed and is read, though source is %s", kind)
        return HiddenCache(
            run.artifact("hidden"),
            cache_gb=resources.storage.copies_gb,
            check_reads=resources.checks.reads,
        )
    if kind == "online":
        return open_online(run, is_first=world.is_first, report=report)
    count = run.config.train.acceptance_samples
    return open_rolling(
        run,
        share=lambda index: acceptance_numbers(index, count)[world.rank :: world.size],
        is_first=world.is_first,
        report=report,
    )
