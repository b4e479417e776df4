"""The plan of a run: a sample of its rows, the target's config and this machine's speed, put
together.
"""

import logging
from functools import partial

from deepspec.artifacts.run import Run
from deepspec.errors import ArtifactMismatch
from deepspec.formatting import human_bytes
from deepspec.plan.arithmetic import Fit, Shape, histogram, require_fit, room
from deepspec.plan.cache_size import bytes_by_codec, cache_bytes
from deepspec.plan.forecast import compute_plan
from deepspec.plan.measure import draft_parameters, measure_speed, measure_store, num_lanes
from deepspec.plan.parts import Facts, Plan
from deepspec.plan.workload import sample_workload
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.loading import DTYPES, check_settings, choose_device, read_text_config

log = logging.getLogger(__name__)


def plan_run(run: Run, *, num_rows: int = 256, train_hours: float | None = None) -> Plan:
    """Sample, measure and compute; reads the run's inputs and leaves nothing in the store.

    Raises:
        DataError: the source, the tokenizer or the target's config cannot be read.
        ConfigError: settings that the target cannot follow.
        StoreError: the store cannot be written to.
    """
    config, resources = run.config, run.config.resources
    _require_demo(run)
    text = read_text_config(config.target, folder=target_folder(run))
    check_settings(config.target, text)
    num_parameters = draft_parameters(config.target, config.draft, text)
    run.store.check_writable()
    work = sample_workload(run, load_chat(run), num_rows=num_rows)
    speed = measure_speed(
        text,
        dtype=DTYPES[config.target.dtype],
        device=choose_device(resources.devices.type),
        batch_tokens=resources.memory.batch_tokens,
        length=histogram([size.tokens for size in work.sizes]).p50,
    )
    facts = Facts(
        work=work,
        shape=Shape(len(config.target.layer_ids), text.hidden_size, text.vocab_size),
        draft_parameters=num_parameters,
        speed=speed,
        lanes=num_lanes(resources.devices.lanes, speed.device),
        store_bytes_per_s=measure_store(run.store),
        missing=_missing_share(run),
        train_hours=train_hours,
    )
    return compute_plan(config, facts, room=partial(_room, run))


def _require_demo(run: Run) -> None:
    if run.config.demo is not None and run.artifact("demo").manifest() is None:
        raise ArtifactMismatch(
            "the demo's target and prompts do not exist yet, so there is nothing to measure",
            where=run.artifact("demo").url,
            fix=f"run `{run.command('demo')}` first",
        )


def _missing_share(run: Run) -> float:
    captured = len(run.artifact("hidden").record_shards())
    return 1 - captured / max(len(run.artifact("prompts").record_shards()), captured, 1)


def _room(run: Run, num_bytes: float) -> Fit:
    return room(num_bytes, run.store, min_free_gb=run.config.resources.storage.min_free_gb)


def check_cache_fits(run: Run, *, num_rows: int = 64) -> None:
    """Refuse to start a capture whose missing shards the store cannot hold.

    Raises:
        StoreError: naming what is needed, what is free, and what would fit.
    """
    missing, config = _missing_share(run), run.config
    if not missing:
        return
    text = read_text_config(config.target, folder=target_folder(run))
    shape = Shape(len(config.target.layer_ids), text.hidden_size, text.vocab_size)
    counts = sample_workload(run, load_chat(run), num_rows=num_rows).counts.scaled(missing)
    fit = _room(run, cache_bytes(counts, config.hidden, shape))
    advice = fit_advice(fit, bytes_by_codec(counts, config.hidden, shape))
    if config.resources.checks.space == "refuse":
        fix = f"{advice}, or --force to begin all the same and pause when it is full"
        require_fit(fit, where=f"store {config.store}", fix=fix)
    elif not fit.fits:
        log.warning("the hidden states will not fit into %s: %s", config.store, advice)


def require_plan_fits(plan: Plan) -> None:
    """Refuse a plan whose hidden states do not fit.

    Raises:
        StoreError: naming what is needed, what is free, and what would fit.
    """
    if plan.fit is None:
        return
    fix = "lower resources.training.rolling_gb, or choose another store (--store)"
    if plan.sources.chosen == "cache":
        missing = plan.size.missing_bytes.value / max(plan.size.num_bytes.value, 1)
        sizes = {name: missing * size for name, size in plan.size.bytes_by_codec.items()}
        fix = f"{fit_advice(plan.fit, sizes)}, or --force to plan without being refused"
    require_fit(plan.fit, where=f"store {plan.store}", fix=fix)


def fit_advice(fit: Fit, sizes: dict[str, float]) -> str:
    """What would fit: the codecs by their bytes, else the share of the prompts."""
    free = (fit.free_bytes or 0.0) - fit.reserve_bytes
    fitting = [f"{name} {human_bytes(size)}" for name, size in sizes.items() if size <= free]
    if fitting:
        advice = f"choose a hidden.codec that fits ({'; '.join(fitting)})"
    else:
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
