"""The plan of a run: what the sample, the target's config and this machine say, put together
into numbers to decide by.
"""

from __future__ import annotations

import logging

from deepspec.artifacts.run import Run
from deepspec.errors import ArtifactMismatch
from deepspec.formatting import human_bytes
from deepspec.plan.arithmetic import (
    Fit,
    Shape,
    bytes_by_codec,
    hidden_bytes,
    hidden_settings,
    histogram,
    require_fit,
    room,
)
from deepspec.plan.forecast import Facts, Plan, compute_plan
from deepspec.plan.measure import draft_parameters, measure_speed, measure_store, num_lanes
from deepspec.plan.workload import sample_workload
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.loading import check_settings, read_text_config

log = logging.getLogger(__name__)


def plan_run(run: Run, *, num_rows: int = 256, train_hours: float | None = None) -> Plan:
    """Sample, measure and compute; reads the run's inputs and writes nothing that stays.

    Raises:
        DataError: the source, the tokenizer or the target's config cannot be read.
        ConfigError: settings that the target cannot follow.
        StoreError: the store cannot be written to.
    """
    config = run.config
    _require_demo(run)
    text = read_text_config(config.target, folder=target_folder(run))
    check_settings(config.target, text)
    shape = Shape(len(config.target.layer_ids), text.hidden_size, text.vocab_size)
    num_parameters = draft_parameters(config, text)
    store = run.store
    store.check_writable()
    work = sample_workload(run, load_chat(run), num_rows=num_rows)
    median = histogram([size.tokens for size in work.sizes]).p50
    speed = measure_speed(config, text, median_tokens=median)
    facts = Facts(
        work=work,
        shape=shape,
        draft_parameters=num_parameters,
        speed=speed,
        lanes=num_lanes(config, speed.device),
        store_bytes_per_s=measure_store(store),
        missing=_missing_share(run),
        train_hours=train_hours,
    )
    return compute_plan(
        config,
        facts,
        room=lambda needed: room(needed, store, min_free_gb=config.resources.storage.min_free_gb),
    )


def _require_demo(run: Run) -> None:
    config = run.config
    if config.demo is not None and run.artifact("demo").manifest() is None:
        what = "the demo's target and prompts do not exist yet, so there is nothing to measure"
        raise ArtifactMismatch(
            what, where=run.artifact("demo").url, fix=f"run `{run.command('demo')}` first"
        )


def _missing_share(run: Run) -> float:
    hidden, prompts = (
        run.artifact("hidden").record_shards(),
        run.artifact("prompts").record_shards(),
    )
    return 1 - len(hidden) / max(len(prompts), len(hidden), 1)


def check_cache_fits(run: Run, *, num_rows: int = 64) -> None:
    """Refuse to start a capture whose missing shards the store cannot hold; for the start of the
    hidden stage.

    Raises:
        StoreError: naming what is needed, what is free, and what would fit.
    """
    config = run.config
    missing = _missing_share(run)
    if not missing:
        return
    text = read_text_config(config.target, folder=target_folder(run))
    shape = Shape(len(config.target.layer_ids), text.hidden_size, text.vocab_size)
    counts = sample_workload(run, load_chat(run), num_rows=num_rows).counts
    needed = missing * hidden_bytes(counts, hidden_settings(config.hidden), shape)
    fit = room(needed, run.store, min_free_gb=config.resources.storage.min_free_gb)
    sizes = bytes_by_codec(counts, hidden_settings(config.hidden), shape)
    advice = fit_advice(fit, {name: missing * size for name, size in sizes.items()})
    if config.resources.checks.space == "refuse":
        require_fit(
            fit,
            where=f"store {config.store}",
            fix=f"{advice}, or --force to begin all the same and pause when it is full",
        )
    elif not fit.fits:
        log.warning("the hidden states will not fit into %s: %s", config.store, advice)


def require_plan_fits(plan: Plan) -> None:
    """Raise the StoreError of a plan whose cache does not fit."""
    if plan.fit is None:
        return
    if plan.sources.chosen != "cache":
        require_fit(
            plan.fit,
            where=f"store {plan.store}",
            fix="lower resources.training.rolling_gb, or choose another store (--store)",
        )
        return
    missing = plan.size.missing_bytes.value / max(plan.size.num_bytes.value, 1)
    sizes = {name: missing * size for name, size in plan.size.bytes_by_codec.items()}
    require_fit(
        plan.fit,
        where=f"store {plan.store}",
        fix=f"{fit_advice(plan.fit, sizes)}, or --force to be told without being stopped",
    )


def fit_advice(fit: Fit, sizes: dict[str, float]) -> str:
    """What would fit: the codecs by their bytes, else the share of the prompts."""
    free = (fit.free_bytes or 0.0) - fit.reserve_bytes
    fitting = [f"{name} {human_bytes(size)}" for name, size in sizes.items() if size <= free]
    smallest = min(sizes, key=lambda name: sizes[name])
    codecs = f"choose a hidden.codec that fits ({'; '.join(fitting)})"
    if not fitting:
        codecs = f"no hidden.codec fits (the smallest, {smallest}, takes {human_bytes(sizes[smallest])}): "
        codecs += f"plan with {max(0.0, free / max(sizes[smallest], 1)):.1%} of the prompts (prompts.limit)"
    return f"{codecs}, or another store (--store), or train without the whole of it (resources.training.source; `plan` compares)"
