"""The train stage: a draft learns from hidden states, wherever these come from."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import require_sealed, trains_without_cache
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.cache.reader import HiddenCache
from deepspec.cache.source import Source
from deepspec.errors import TransientError
from deepspec.hidden.online import open_online
from deepspec.hidden.rolling import open_rolling
from deepspec.model.execution import compiles
from deepspec.process.events import Report, silent
from deepspec.train.batches import StepData
from deepspec.train.cache_check import check_cache
from deepspec.train.checkpoint_clock import CheckpointClock
from deepspec.train.checkpoint_files import resume_draft, resume_optimizer
from deepspec.train.checkpointing import Checkpoints
from deepspec.train.deepspeed_setup import load_deepspeed
from deepspec.train.distributed import World, join_world, leaving_group
from deepspec.train.draft_artifact import make_draft, save_untrained, seal_draft
from deepspec.train.launcher import check_batch, on_sigterm
from deepspec.train.memory_check import require_training_room
from deepspec.train.metrics_log import MetricsLog
from deepspec.train.out_of_memory import explain_oom
from deepspec.train.preflight import check_before_training
from deepspec.train.step import StepMetrics, StepResult, Trainer, train_step
from deepspec.train.strategy import Replicated, Strategy, trainable
from deepspec.train.throughput import Throughput
from deepspec.train.validation import acceptance_numbers
from deepspec.train.watchdog import ending_late_stops, watchdog
from deepspec.train.zero import Zero

log = logging.getLogger(__name__)

LOG_STEPS = 10  # optimizer steps between two lines of metrics


@leaving_group()
def run_train(run: Run, report: Report = silent) -> Artifact:
    """Train from the newest checkpoint (or the start) to the last step, then seal the draft.

    Raises:
        ConfigError, ArtifactMismatch: the batch cannot be dealt to the ranks, or the cache is not
            this run's; no weight was loaded.
        OutOfMemory: names the settings that a step's memory goes by.
        TransientError: stopped by SIGTERM; the step was finished and a checkpoint written.
    """
    artifact = run.artifact("train")
    inputs = require_sealed(run, "train")
    if stage_status(run, "train").sealed:
        log.info("stage=train nothing is left to do: %s/draft", artifact.url)
        return artifact
    resources = run.config.resources
    # The watchdog must be first to end a stall: it reports more than a collective that times out.
    timeout = timedelta(minutes=2 * resources.retries.stall_minutes)
    dtype = run.config.train.compute_dtype
    world = join_world(resources.devices.type, dtype=dtype, timeout=timeout)
    check_batch(run.config.train.global_batch, world.size)
    require_training_room(run, world, compiled=compiles(run.config, world.device))
    if run.config.train.strategy == "deepspeed":
        load_deepspeed(world.device)  # before anything is read
    if world.is_first:
        run.create("train")
    else:
        report = silent
    with contextlib.closing(open_source(run, world, report)) as source:
        if world.is_first and isinstance(source, HiddenCache):
            check_cache(run, source)
        world.wait()  # no rank goes on before
        data = StepData(source, run.config, world)
        with explain_oom(run.config):
            _train(run, data, inputs, report)
        data.finish()
        if world.is_first:
            seal_draft(artifact, inputs)
        world.wait()
    return artifact


def open_source(run: Run, world: World, report: Report) -> Source:
    """The source of hidden states, its index, layout and held-out samples ready to be read.

    A sealed cache is read where there is one, whatever `resources.training.source` is.

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


def _train(run: Run, data: StepData, inputs: dict[str, str], report: Report) -> None:
    """Resume, and train what is left."""
    config, artifact, world = run.config, run.artifact("train"), data.world
    draft = make_draft(config, data.source, world.device)
    record = resume_draft(artifact, draft, inputs)
    first, total = record.step if record else 0, data.total_steps
    message = "stage=train steps=%d of %d samples=%d ranks=%d device=%s"
    log.info(message, first, total, len(data.numbers), world.size, world.device)
    data.begin(first)
    if total == 0 and record is None:
        save_untrained(artifact, Replicated(draft, config.train, world), inputs)
    if first == total:  # killed before it was sealed: no sample is needed, nor made
        return
    if first == 0:
        check_before_training(run, data, draft)
    trained = sum(map(torch.numel, trainable(draft).values()))
    num_bytes = 4 * sum(map(torch.numel, draft.parameters())) + 8 * trained
    if config.train.strategy == "ddp":
        strategy: Strategy = Replicated(draft, config.train, world)
    else:
        filler = data.load(data.drawn(first)[:1])
        strategy = Zero(draft, config, world, filler=filler, artifact=artifact)
    if record:
        resume_optimizer(artifact, record, strategy)
    trainer = Trainer(
        settings=config.train,
        artifact=artifact,
        inputs=inputs,
        world=world,
        data=data,
        strategy=strategy,
        metrics=StepMetrics(),
        throughput=Throughput(world.device, first=first, total=total),
        clock=CheckpointClock(
            config.resources.training.checkpoint_minutes,
            num_bytes=num_bytes,
            runner=config.resources.runner,
        ),
        stop=threading.Event(),
    )
    with (
        _ending_with_others(world, trainer.stop),
        explain_oom(config),
        on_sigterm(trainer.stop.set),
        ending_late_stops(trainer.clock.stop_s, report),
        watchdog(60 * config.resources.retries.stall_minutes, report) as beat,
    ):
        # Until all shards of a window are captured, no step may be possible.
        data.source.on_progress(beat)
        train_steps(trainer, first, report=report, on_step=beat)


def train_steps(
    trainer: Trainer, first: int, *, report: Report, on_step: Callable[[], object]
) -> None:
    """Optimizer steps `first` to the last, logged and saved on the way.

    Raises:
        TransientError: some rank was to stop; the step was finished and a checkpoint written.
    """
    total, clock = trainer.data.total_steps, trainer.clock
    metrics_log = MetricsLog(trainer.artifact, first=first, is_writer=trainer.world.is_first)
    checkpoints = Checkpoints(trainer)
    metrics_log.add(first, checkpoints.measure_resumed(first))
    for step in range(first, total):
        if checkpoints.no_better():
            break
        if (stop_s := clock.request()) is not None:
            report({"event": "stop_time", "stage": "train", "seconds": round(stop_s, 1)})
        result = train_step(trainer, step)
        clock.step_ended()
        done = step + 1
        if done % LOG_STEPS == 0 or done == total:
            _log_step(trainer, done, result, metrics_log, report)
        if checkpoints.is_regular(done) or done == total or result.save or result.stop:
            metrics_log.add(done, checkpoints.save(done, result))
            metrics_log.write()
            clock.checkpoint_saved()
        if result.stop and done < total:
            trainer.world.wait()  # the first rank to end ends the others, and one of them is saving
            what = f"training was asked to stop, and did after step {done}"
            fix = "run it again: it goes on from there"
            raise TransientError(what, where=trainer.artifact.url, fix=fix)
        on_step()


def _log_step(
    trainer: Trainer, done: int, result: StepResult, metrics_log: MetricsLog, report: Report
) -> None:
    """Add a line of what the steps since the last one came to, and report the progress."""
    means = trainer.metrics.read(trainer.world)
    pace = trainer.throughput.read(done)
    numbers = {
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        **means,
        "data_wait_share": pace.data_wait_share,
        "peak_memory_bytes": pace.peak_memory_bytes,
        "tokens_per_s": pace.tokens_per_s,
    }
    metrics_log.add(done, numbers)
    report(
        {
            "event": "progress",
            "stage": "train",
            "done": done,
            "total": trainer.data.total_steps,
            "unit": "steps",
            "tokens": trainer.throughput.tokens,
            "loss": round(result.loss, 4),
            "acceptance_length": round(means.get("acceptance_length", 0.0), 3),
            "tokens_per_s": pace.tokens_per_s,
            "left_s": pace.left_s,
        }
    )


@contextlib.contextmanager
def _ending_with_others(world: World, stop: threading.Event) -> Iterator[None]:
    """End by SIGTERM where one rank failed and torchrun asked the others, once, to stop.

    What fails after that is a consequence of the rank that died, and would hide its error.
    """
    try:
        yield
    except RuntimeError:
        if world.size > 1 and stop.is_set():
            log.exception("stage=train stops as it was asked to")
            signal.raise_signal(signal.SIGTERM)
        raise
