"""The serving engines that a draft can be exported for: one record each.

What they can load was read from the sources of vLLM 0.32.0, SGLang 0.5.23 and speculators 0.9.0;
docs/serving.md lists it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from deepspec.config.draft import MarkovConfig
from deepspec.config.families import GEMMA4
from deepspec.errors import ConfigError
from deepspec.export import commands, formats
from deepspec.export.formats import Config
from deepspec.model.spec import DraftSpec

# Their DFlash is another block layout, in which the anchor predicts nothing.
NO_BIAS = MarkovConfig(rank=1, kind="vanilla")


class ServingEngine(NamedTuple):
    """How one engine reads a draft."""

    name: str
    library: str  # `library_name` of the model card
    # how to serve a draft with it, for the model card; the file of its calibration, if any
    serving: Callable[[DraftSpec, str | None], str]
    # why it cannot load a draft, or None where it can
    why_not: Callable[[DraftSpec], str | None]
    # its config.json of a draft with tensors of a dtype
    write: Callable[[DraftSpec, str], Config] = formats.engine_config
    # back to the published one, from what the engine reads
    read: Callable[[Config], Config] = formats.read_engine_config
    reads_temperatures: bool = False  # of the confidence head, from calibration.json
    needs_markov: bool = True  # in every draft that proposes blocks

    def served(self, spec: DraftSpec) -> DraftSpec:
        """The draft as the engine is to take it: DSpark, whose Markov head is zeros where the draft
        has none; but its own DFlash where the draft is that.
        """
        if spec.algorithm == "eagle3" or spec.markov or not self.needs_markov:
            return spec
        if formats.is_engines_dflash(spec):
            return spec
        return replace(spec, algorithm="dspark", markov=NO_BIAS)

    def leaves_out_frozen(self, spec: DraftSpec) -> bool:
        """Whether embedding and lm_head are the target's, and no part of the folder."""
        return self.needs_markov and formats.is_engines_dflash(spec)


def chosen_engine(name: str, spec: DraftSpec) -> ServingEngine:
    """The engine of this name, which can load the draft.

    Raises:
        ConfigError: there is none, or it cannot: with the reason, and the engines that can.
    """
    if name not in ENGINES:
        raise ConfigError(
            f"there is no engine {name!r}", where="--to", fix=f"choose one of: {', '.join(ENGINES)}"
        )
    if reason := ENGINES[name].why_not(spec):
        possible = [other for other, engine in ENGINES.items() if engine.why_not(spec) is None]
        raise ConfigError(
            f"{name} cannot load this {spec.algorithm} draft for {spec.family.name}: {reason}",
            where=f"--to {name}",
            fix=f"export to {' or '.join(possible)}",
        )
    return ENGINES[name]


def _not_in_vllm(spec: DraftSpec) -> str | None:
    if spec.family is GEMMA4:
        if spec.algorithm == "eagle3":
            return (
                "its Eagle3 model has Qwen3 layers: Gemma4's further norms, V = K and soft-cap"
                " would be dropped"
            )
        if not spec.heads.values_are_keys:
            return (
                "its Gemma4 model computes the context's values from the key projection (V = K),"
                " and this draft has a value projection of its own"
            )
    return _not_vanilla(spec)


def _not_in_sglang(spec: DraftSpec) -> str | None:
    if spec.algorithm == "eagle3":
        return (
            "its Eagle3 model is LlamaForCausalLMEagle3, which has no q and k norms and reads"
            " exactly three layers"
        )
    if spec.family is GEMMA4:
        return "it has no DSpark model for Gemma4"
    if -1 in spec.target_layer_ids:
        return "it refuses layer -1, and this draft reads the target's embedding output"
    return None


def _not_in_speculators(spec: DraftSpec) -> str | None:
    if spec.family is GEMMA4:
        return "what serves the speculators format has Qwen3 layers only"
    return _not_vanilla(spec)


def _not_vanilla(spec: DraftSpec) -> str | None:
    if spec.markov is None or spec.markov.kind == "vanilla":
        return None
    return (
        "it computes the vanilla Markov head only, and this draft has a"
        f" {spec.markov.kind} Markov head"
    )


ENGINES = {
    engine.name: engine
    for engine in (
        ServingEngine(
            name="vllm", library="vllm", serving=commands.with_vllm, why_not=_not_in_vllm
        ),
        ServingEngine(
            name="sglang",
            library="sglang",
            serving=commands.with_sglang,
            why_not=_not_in_sglang,
            reads_temperatures=True,
        ),
        ServingEngine(
            name="speculators",
            library="speculators",
            serving=commands.with_speculators,
            why_not=_not_in_speculators,
            write=formats.speculators_config,
            read=formats.read_speculators_config,
        ),
        ServingEngine(
            name="hf",
            library="transformers",
            serving=commands.with_deepspec,
            why_not=lambda spec: None,
            write=formats.published_config,
            needs_markov=False,
        ),
    )
}
