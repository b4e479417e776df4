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
    # how to serve a draft with it, for the model card; the draft's spec and algorithm are filled in
    serve: str = ""
    # its config.json of a draft with tensors of a dtype
    write: Callable[[DraftSpec, str], Config] = formats.engine_config
    # back to the published one, from what the engine reads
    read: Callable[[Config], Config] = formats.read_engine_config
    # algorithms whose embedding and lm_head it takes from the target
    takes_targets: tuple[str, ...] = ()
    reads_temperatures: bool = False  # of the confidence head, as a tensor
    loads_all: bool = False
    vanilla_only: bool = False  # of the Markov heads
    # why it cannot load drafts of a kind, or None where it can
    not_dspark_gemma4: str | None = None
    not_eagle3: str | None = None

    def why_not(self, spec: DraftSpec) -> str | None:
        """Why it cannot load this draft, or None where it can."""
        if self.loads_all:
            return None
        if spec.layout == "anchor_is_context":
            return "drafts whose anchor predicts nothing are not written for engines yet"
        is_gemma4 = spec.family is GEMMA4
        if spec.algorithm == "dspark":
            head = f"a {spec.markov.kind}" if spec.markov else "no"
            if self.vanilla_only and head != "a vanilla":
                return (
                    "it computes the vanilla Markov head only, and this draft has"
                    f" {head} Markov head"
                )
            return self.not_dspark_gemma4 if is_gemma4 else None
        if is_gemma4:
            return (
                f"its {spec.algorithm} model has Qwen3 layers: Gemma4's further norms, V = K and"
                " soft-cap would be dropped"
            )
        return self.not_eagle3 if spec.algorithm == "eagle3" else None


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


ENGINES = {
    engine.name: engine
    for engine in (
        ServingEngine(
            name="vllm",
            library="vllm",
            serve=(
                '`--speculative-config \'{{"method": "{spec.algorithm}", "model": "THIS FOLDER",'
                ' "num_speculative_tokens": {spec.block_size}}}\'`'
            ),
            takes_targets=("dflash",),
            vanilla_only=True,
        ),
        ServingEngine(
            name="sglang",
            library="sglang",
            serve=(
                "`--speculative-algorithm {algorithm} --speculative-draft-model-path THIS FOLDER`"
            ),
            takes_targets=("dflash",),
            reads_temperatures=True,
            not_dspark_gemma4="it has no DSpark model for Gemma4",
            not_eagle3=(
                "its Eagle3 model is LlamaForCausalLMEagle3, which has no q and k norms and reads"
                " exactly three layers"
            ),
        ),
        ServingEngine(
            name="speculators",
            library="speculators",
            write=formats.speculators_config,
            read=formats.read_speculators_config,
            vanilla_only=True,
            not_dspark_gemma4="the speculators format describes Qwen3 layers only",
        ),
        ServingEngine(
            name="hf",
            library="transformers",
            serve="Load it with `deepspec.model.checkpoint.load_draft`.",
            write=formats.published_config,
            loads_all=True,
        ),
    )
}
