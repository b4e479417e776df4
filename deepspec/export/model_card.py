"""The README.md of an exported draft: what it is, how to serve it, its origin and measurements."""

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import lineage_lines, require_info
from deepspec.artifacts.records import ArtifactInfo
from deepspec.export.engines import ServingEngine
from deepspec.export.source import target_name
from deepspec.model.spec import DraftSpec

UNKNOWN = "Unknown: the draft lies outside the artifact store that it was trained in."
UNMEASURED = "Unknown: no sealed evaluation of this draft was found in its store."


def model_card(
    spec: DraftSpec, engine: ServingEngine, *, serving: str, artifact: Artifact | None
) -> str:
    """The card's text; recipe, training data and acceptance come from the train artifact's store.

    They are unknown where the draft is not in its store any more.
    """
    target = target_name(spec)
    front = {"library_name": engine.library, "tags": ["speculative-decoding", spec.algorithm]}
    if target and not target.startswith(("/", ".")):  # a name on the hub
        front["base_model"] = target
    title = f"{spec.algorithm} draft model for {Path(target).name or spec.family.name}"
    sections = {
        "Serving": serving,
        "Recipe": _recipe(artifact) if artifact else UNKNOWN,
        "Training data": _lineage(artifact) if artifact else UNKNOWN,
        "Measured acceptance": "\n".join(_acceptance(artifact) if artifact else ()) or UNMEASURED,
    }
    body = [f"# {title}\n\n{_facts(spec, engine)}\n"]
    body += [f"## {heading}\n\n{text.strip()}\n" for heading, text in sections.items()]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(body)


def _facts(spec: DraftSpec, engine: ServingEngine) -> str:
    layout = "slot k predicts anchor + 1 + k (`sample_from_anchor: true`)"
    if spec.layout == "anchor_is_context":
        layout = "mask token k predicts its own place anchor + k (`sample_from_anchor: false`)"
    facts = {
        "written for": engine.name,
        "target": target_name(spec) or "not named in its config",
        "tokens proposed per round": spec.block_size,
        "decoder layers": spec.num_layers,
        "captured target layers (0-based, output after the layer)": list(spec.target_layer_ids),
        "mask token id": spec.mask_token_id,
        "Markov head": f"{spec.markov.kind}, rank {spec.markov.rank}" if spec.markov else "none",
        "confidence head": "yes" if spec.confidence else "none",
        "block layout": "token by token" if spec.algorithm == "eagle3" else layout,
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _recipe(artifact: Artifact) -> str:
    info = require_info(artifact)
    recipe = yaml.safe_dump(info.recipe, sort_keys=False)
    return f"DeepSpec {info.code_version}:\n\n```yaml\n{recipe}```"


def _lineage(artifact: Artifact) -> str:
    """One line per artifact that this draft was made from, with its manifest's digest."""
    lines = "\n".join(lineage_lines(artifact))
    return f"```\n{lines}\n```"


def _acceptance(artifact: Artifact) -> Iterator[str]:
    """The acceptance lengths of every sealed evaluation of this draft in its store."""
    store = artifact.store
    for folder in store.names("evaluate"):
        path = f"evaluate/{folder}"
        if not all(store.exists(f"{path}/{name}.json") for name in ("manifest", "summary")):
            continue
        info = ArtifactInfo.model_validate_json(store.read(f"{path}/artifact.json"))
        if artifact.key.as_input() not in info.inputs:
            continue
        summary = json.loads(store.read(f"{path}/summary.json"))
        lengths = [f"{name} {value:.2f}" for name, value in summary["acceptance_length"].items()]
        yield (
            f"- `{path}` at temperature {summary['temperature']}: tokens per round"
            f" (bonus included) {', '.join(lengths)}"
        )
