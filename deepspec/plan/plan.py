"""The plan of a run: a sample of its rows, the target's config and this machine's speed, put
together.
"""

import logging
from collections.abc import Mapping
from typing import Any

from deepspec.artifacts.run import Run
from deepspec.errors import ArtifactMismatch, StoreError
from deepspec.formatting import human_bytes
from deepspec.plan.cache_size import bytes_by_codec, cache_bytes
from deepspec.plan.forecast import compute_plan
from deepspec.plan.gpu_memory import memory_part, planned_gpu, require_gpu_holds
from deepspec.plan.measure import draft_parameters, measure_speed, measure_store, num_lanes
from deepspec.plan.parts import Facts, Fit, Plan, Shape, histogram
from deepspec.plan.workload import sample_workload
from deepspec.target.chat import target_folder
from deepspec.target.device import choose_device
from deepspec.target.loading import DTYPES, check_settings, read_text_config
from deepspec.target.peak_memory import StageMemory

log = logging.getLogger(__name__)


def plan_run(
    run: Run, *, num_rows: int = 256, train_hours: float | None = None, gpu_gb: float | None = None
) -> Plan:
    """Sample, measure and compute; reads the run's inputs and leaves nothing in the store.

    Args:
        run: What is planned.
        num_rows: Prompts to sample.
        train_hours: That training takes; None estimates them.
        gpu_gb: Memory of the GPU to plan for; None is that of the one at hand, if any.

    Raises:
        DataError: the source, the tokenizer or the target's config cannot be read.
        ConfigError: settings that the target or the device cannot follow.
        StoreError: the store cannot be written to.
    """
    config, resources = run.config, run.config.resources
    if config.demo is not None and run.artifact("demo").manifest() is None:
        raise ArtifactMismatch(
            "the demo's target and prompts do not exist yet, so there is nothing to measure",
            where=run.artifact("demo").url,
            fix=f"run `{run.command('demo')}` first",
        )
    text = read_text_config(config.target, folder=target_folder(run))
    check_settings(config.target, text)
    num_parameters = draft_parameters(config.target, config.draft, text)
    free_bytes = _free_bytes(run)
    work = sample_workload(run, num_rows=num_rows)
    device = choose_device(resources.devices.type, dtype=config.target.dtype)
    gpu = planned_gpu(gpu_gb, device)
    # as on a GPU where nothing hinders it
    compiled = bool(resources.training.compile) and not config.partitions_weights
    stages = StageMemory(config, text.to_dict(), compiled=compiled)
    speed = measure_speed(
        text,
        dtype=DTYPES[config.target.dtype],
        device=device,
        batch_tokens=resources.memory.batch_tokens,
        length=histogram([size.tokens for size in work.sizes]).p50,
    )
    facts = Facts(
        work=work,
        shape=_shape(run, text),
        draft_parameters=num_parameters,
        speed=speed,
        lanes=num_lanes(resources.devices, speed.device),
        store_bytes_per_s=measure_store(run.store),
        free_bytes=free_bytes,
        missing=_missing_share(run),
        train_hours=train_hours,
        memory=memory_part(stages, gpu) if gpu else None,
    )
    return compute_plan(config, facts)


def _shape(run: Run, text_config: Any) -> Shape:
    layers = run.config.target.layer_ids
    return Shape(len(layers), text_config.hidden_size, text_config.vocab_size)


def _free_bytes(run: Run) -> float | None:
    """The room in the store: a bucket has no end, its spool disk holds a few shards at a time."""
    run.store.check_writable()
    return run.store.free_bytes() if run.store.is_local else None


def _missing_share(run: Run) -> float:
    captured = len(run.artifact("hidden").record_shards())
    return 1 - captured / max(len(run.artifact("prompts").record_shards()), captured, 1)


def check_cache_fits(run: Run) -> None:
    """Refuse to start a capture whose missing shards the store cannot hold.

    Raises:
        StoreError: naming what is needed, what is free, and what would fit.
    """
    missing, config = _missing_share(run), run.config
    if not missing:
        return
    shape = _shape(run, read_text_config(config.target, folder=target_folder(run)))
    counts = sample_workload(run, num_rows=64).counts.scaled(missing)
    num_bytes = cache_bytes(counts, config.hidden, shape)
    fit = Fit(num_bytes, _free_bytes(run), config.resources.storage.min_free_gb * 1e9)
    advice = _advice(fit, bytes_by_codec(counts, config.hidden, shape))
    if config.resources.checks.space == "refuse":
        fix = f"{advice}, or --force to begin all the same and pause when it is full"
        _require(fit, config.store, fix)
    elif not fit.fits:
        log.warning("the hidden states will not fit into %s: %s", config.store, advice)


def require_plan_fits(plan: Plan) -> None:
    """Refuse a plan whose hidden states do not fit the store, or whose stages the GPU.

    Raises:
        ConfigError: as `require_gpu_holds`.
        StoreError: naming what is needed, what is free, and what would fit.
    """
    require_gpu_holds(plan.memory)
    if plan.fit is None:
        return
    fix = "lower resources.training.rolling_gb, or choose another store (--store)"
    if plan.sources.chosen == "cache":
        missing = plan.size.missing_bytes / max(plan.size.num_bytes, 1)
        sizes = {name: missing * size for name, size in plan.size.bytes_by_codec.items()}
        fix = f"{_advice(plan.fit, sizes)}, or --force to plan without being refused"
    _require(plan.fit, plan.store, fix)


def _require(fit: Fit, store: str, fix: str) -> None:
    if fit.fits:
        return
    raise StoreError(
        f"the hidden states need {human_bytes(fit.needed_bytes)} and resources.storage.min_free_gb "
        f"keeps {human_bytes(fit.reserve_bytes)}, but {human_bytes(fit.free_bytes or 0)} are free",
        where=f"store {store}",
        fix=fix,
    )


def _advice(fit: Fit, sizes: Mapping[str, float]) -> str:
    """What would fit: the codecs by their bytes, else the share of the prompts."""
    free = (fit.free_bytes or 0.0) - fit.reserve_bytes
    fitting = [f"{name} {human_bytes(size)}" for name, size in sizes.items() if size <= free]
    advice = f"choose a hidden.codec that fits ({'; '.join(fitting)})"
    if not fitting:
        smallest = min(sizes, key=lambda name: sizes[name])
        share = max(0.0, free / max(sizes[smallest], 1))
        advice = (
            f"no hidden.codec fits (the smallest, {smallest}, takes "
            f"{human_bytes(sizes[smallest])}): plan with {share:.1%} of the prompts (prompts.limit)"
        )
    return (
        f"{advice}, or another store (--store), or train without the whole of it "
        "(resources.training.source; `plan` compares)"
    )
