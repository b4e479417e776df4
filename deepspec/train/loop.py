"""The train stage: a draft learns from hidden states, read from a cache or made while it trains
(`source`).
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import require_sealed
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.cache.reader import HiddenCache
from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed, TransientError
from deepspec.model.drafter import Drafter
from deepspec.process.events import Report, silent
from deepspec.train.batches import StepData
from deepspec.train.cache_check import check_cache
from deepspec.train.checkpoint_files import (
    append_metrics,
    read_metrics,
    resume_draft,
    resume_optimizer,
)
from deepspec.train.checkpointing import Checkpoints, held_out
from deepspec.train.distributed import join_world
from deepspec.train.draft_artifact import make_draft, seal_draft
from deepspec.train.launcher import check_batch, on_sigterm
from deepspec.train.metrics import StepMetrics
from deepspec.train.out_of_memory import explain_oom
from deepspec.train.parallel import check_strategy, make_strategy
from deepspec.train.preflight import check_before_training
from deepspec.train.source import open_source
from deepspec.train.step import Trainer, train_step
from deepspec.train.tensorboard_log import can_write_scalars, write_scalars
from deepspec.train.throughput import Pace, Vitals
from deepspec.train.watchdog import Watchdog

log = logging.getLogger(__name__)

LOG_STEPS = 10  # optimizer steps between two lines of metrics


def run_train(run: Run, report: Report = silent) -> Artifact:
    """Train from the newest checkpoint (or the start) to the last step, then write `draft/` and
    seal.

    Raises:
        ConfigError, ArtifactMismatch: the batch cannot be dealt to the ranks, or the cache is not
            this run's; no weight was loaded.
        TransientError: SIGTERM asked to stop; the step was finished and a checkpoint written.
    """
    with ExitStack() as at_end:
        return _run(run, report, at_end)


def _run(run: Run, report: Report, at_end: ExitStack) -> Artifact:
    config = run.config
    artifact = run.artifact("train")
    inputs = require_sealed(run, "train")
    if stage_status(run, "train").sealed:
        log.info("stage=train nothing is left to do: %s/draft", artifact.url)
        return artifact
    resources = config.resources
    # The watchdog is to speak first: a collective that times out says less, and one that saves may
    # be slow.
    world = join_world(
        resources.devices.type, timeout=timedelta(minutes=2 * resources.retries.stall_minutes)
    )
    check_batch(config, world.size)
    check_strategy(config, world)
    report = report if world.is_first else silent
    if world.is_first:
        run.create("train")
    cache = open_source(run, world, report)
    at_end.callback(cache.close)
    if world.is_first and isinstance(cache, HiddenCache):
        check_cache(run, cache)
    world.wait()  # no rank goes on before
    data = StepData(cache, config, world)
    draft = make_draft(config, cache).to(world.device)
    record = resume_draft(artifact, draft, inputs)
    first = record.step if record else 0
    data.begin(first)
    log.info(
        "stage=train steps=%d of %d samples=%d ranks=%d device=%s",
        first,
        data.total_steps,
        len(data.numbers),
        world.size,
        world.device,
    )
    if first == data.total_steps:  # killed before it was sealed: no sample will be needed, nor made
        return _sealed(artifact, inputs, data)
    if first == 0:
        _preflight(config, data, draft)
    strategy = make_strategy(
        config, artifact, world, draft=draft, filler=partial(data.load, data.drawn(first)[:1])
    )
    del draft  # its parts are the strategy's now
    if record:
        resume_optimizer(artifact, record, strategy)
    stop = threading.Event()
    try:
        with (
            on_sigterm(stop.set),
            Watchdog(60 * resources.retries.stall_minutes, report) as watchdog,
        ):
            # until all shards of a window are captured no step may be possible
            cache.on_progress(watchdog.beat)
            train_steps(
                Trainer(
                    config, artifact, world, strategy, stop, watchdog, Vitals(world.device), inputs
                ),
                data,
                first,
                report,
            )
    except RuntimeError:
        if world.size > 1 and stop.is_set():
            # torchrun asks the ranks that are left to end, once: what fails after that is the echo
            # of the one that died.
            log.exception("stage=train ends as it was asked to")
            signal.raise_signal(signal.SIGTERM)
        raise
    return _sealed(artifact, inputs, data)


def _preflight(config: RunConfig, data: StepData, draft: Drafter) -> None:
    try:
        with explain_oom(config):
            check_before_training(config, data, draft)
    except TrainingFailed as error:
        if config.resources.checks.preflight == "refuse":
            raise
        log.warning("stage=train preflight: %s", error.what)


def _sealed(artifact: Artifact, inputs: dict[str, str], data: StepData) -> Artifact:
    """The artifact, once the first rank has sealed it."""
    data.finish()
    if data.world.is_first:
        seal_draft(artifact, inputs)
    data.world.wait()
    return artifact


def train_steps(trainer: Trainer, data: StepData, first: int, report: Report) -> None:
    """Optimizer steps `first` to the last, logging and saving on the way, and before it stops
    because it was asked to.
    """
    metrics, total = StepMetrics(), data.total_steps
    history, pace = read_metrics(trainer.artifact, first), Pace(first, total)
    scalars = trainer.world.is_first and can_write_scalars()
    checkpoints = Checkpoints(trainer, data)
    history += checkpoints.resumed(first)
    for step in range(first, total):
        if checkpoints.no_better():
            break
        pace.add(sum(drawn.num_tokens for drawn in data.drawn(step)))
        with explain_oom(trainer.config):
            result = train_step(trainer, data, step, metrics)
        done = step + 1
        if logged := done % LOG_STEPS == 0 or done == total:
            numbers = {
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                **metrics.read(trainer.world),
                **trainer.vitals.read(),
            }
            speed = pace.read(done)
            history.append(
                {
                    "step": done,
                    "time": time.time(),
                    **numbers,
                    "tokens_per_s": speed["tokens_per_s"],
                }
            )
        if done % trainer.config.train.checkpoint_steps == 0 or done == total or result.stop:
            history += held_out(checkpoints.save(done, result))
            if trainer.world.is_first:
                append_metrics(trainer.artifact, history)
            if scalars:
                write_scalars(trainer.artifact, history)
        if logged:
            shown = {
                "loss": round(result.loss, 4),
                "acceptance_length": round(numbers.get("acceptance_length", 0.0), 3),
                **speed,
            }
            report(
                {
                    "event": "progress",
                    "stage": "train",
                    "done": done,
                    "total": total,
                    "unit": "steps",
                    "tokens": pace.tokens,
                    **shown,
                }
            )
        if result.stop and done < total:
            trainer.world.wait()  # the first rank to end ends the others, and one of them is saving
            fix = "run it again: it goes on from there"
            raise TransientError(
                f"training was asked to stop, and did after step {done}",
                where=trainer.artifact.url,
                fix=fix,
            )
        trainer.watchdog.beat()
