"""The serving engines that a draft can be exported for: one record each.

What they can load is as of mid-2026, read from their sources.
"""

from collections.abc import Callable
from typing import NamedTuple

from deepspec.config.families import GEMMA4
from deepspec.errors import ConfigError
from deepspec.export import formats
from deepspec.export.formats import Config
from deepspec.model.spec import DraftSpec


class ServingEngine(NamedTuple):
    """How one engine reads a draft."""

    name: str
    library: str  # `library_name` of the model card
    write: Callable[[DraftSpec, str], Config]  # its config.json of a draft with tensors of a dtype
    read: Callable[[Config], Config]  # back to the published one, from what the engine reads
    why_not: Callable[[DraftSpec], str | None]  # why it cannot load a draft, or None where it can
    serve: Callable[[DraftSpec], str]  # how to serve a draft with it, for the model card
    # algorithms whose embedding and lm_head it takes from the target
    takes_targets: tuple[str, ...] = ()
    reads_temperatures: bool = False  # of the confidence head, as a tensor


def chosen_engine(name: str) -> ServingEngine:
    """The engine of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ENGINES:
        raise ConfigError(
            f"there is no engine {name!r}", where="--to", fix=f"choose one of: {', '.join(ENGINES)}"
        )
    return ENGINES[name]


def check_loadable(spec: DraftSpec, engine: ServingEngine) -> None:
    """Refuse a draft that the engine cannot load.

    Raises:
        ConfigError: with the reason, and the engines that can.
    """
    reason = engine.why_not(spec)
    if reason is None:
        return
    possible = [other.name for other in ENGINES.values() if other.why_not(spec) is None]
    raise ConfigError(
        f"{engine.name} cannot load this {spec.algorithm} draft for {spec.family.name}: {reason}",
        where=f"--to {engine.name}",
        fix=f"export to {' or '.join(possible)}",
    )


def _not_vllm(spec: DraftSpec) -> str | None:
    return _not_vanilla(spec) if spec.algorithm == "dspark" else _not_qwen3(spec)


def _not_sglang(spec: DraftSpec) -> str | None:
    if spec.algorithm == "dspark":
        return "it has no DSpark model for Gemma4" if spec.family is GEMMA4 else None
    if spec.algorithm == "eagle3" and spec.family is not GEMMA4:
        return (
            "its Eagle3 model is LlamaForCausalLMEagle3, which has no q and k norms and reads"
            " exactly three layers"
        )
    return _not_qwen3(spec)


def _not_speculators(spec: DraftSpec) -> str | None:
    if spec.algorithm != "dspark":
        return _not_qwen3(spec)
    gemma = "the speculators format describes Qwen3 layers only" if spec.family is GEMMA4 else None
    return _not_vanilla(spec) or gemma


def _not_vanilla(spec: DraftSpec) -> str | None:
    if spec.markov is not None and spec.markov.kind == "vanilla":
        return None
    kind = "no" if spec.markov is None else f"a {spec.markov.kind}"
    return f"it computes the vanilla Markov head only, and this draft has {kind} Markov head"


def _not_qwen3(spec: DraftSpec) -> str | None:
    if spec.family is not GEMMA4:
        return None
    return (
        f"its {spec.algorithm} model has Qwen3 layers: Gemma4's further norms, V = K and soft-cap"
        " would be dropped"
    )


def _serve_vllm(spec: DraftSpec) -> str:
    tokens = f'"num_speculative_tokens": {spec.block_size}'
    method = f'"method": "{spec.algorithm}", "model": "THIS FOLDER", {tokens}'
    return f"`--speculative-config '{{{method}}}'`"


def _serve_sglang(spec: DraftSpec) -> str:
    name = spec.algorithm.upper()
    return f"`--speculative-algorithm {name} --speculative-draft-model-path THIS FOLDER`"


ENGINES = {
    engine.name: engine
    for engine in (
        ServingEngine(
            name="vllm",
            library="vllm",
            write=formats.engine_config,
            read=formats.read_engine_config,
            why_not=_not_vllm,
            serve=_serve_vllm,
            takes_targets=("dflash",),
        ),
        ServingEngine(
            name="sglang",
            library="sglang",
            write=formats.engine_config,
            read=formats.read_engine_config,
            why_not=_not_sglang,
            serve=_serve_sglang,
            takes_targets=("dflash",),
            reads_temperatures=True,
        ),
        ServingEngine(
            name="speculators",
            library="speculators",
            write=formats.speculators_config,
            read=formats.read_speculators_config,
            why_not=_not_speculators,
            serve=lambda _: "",
        ),
        ServingEngine(
            name="hf",
            library="transformers",
            write=formats.published_config,
            read=formats.read_published_config,
            why_not=lambda _: None,
            serve=lambda _: "Load it with `deepspec.model.checkpoint.load_draft`.",
        ),
    )
}
