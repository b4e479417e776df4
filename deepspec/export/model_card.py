"""The README.md of an exported draft: what it is, how to serve it, what it was made from, how
it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import chain
from deepspec.artifacts.records import ArtifactInfo, ArtifactKey
from deepspec.export.engines import Engine, target_name
from deepspec.model.spec import DraftSpec
from deepspec.storage.urls import open_store

UNKNOWN = "Unknown: the draft lies outside the artifact store that it was trained in."
SERVE = {
    (
        "vllm",
        "dspark",
    ): '`--speculative-config \'{{"method": "dspark", "model": "THIS FOLDER", "num_speculative_tokens": {block}}}\'`',
    (
        "vllm",
        "dflash",
    ): '`--speculative-config \'{{"method": "dflash", "model": "THIS FOLDER", "num_speculative_tokens": {block}}}\'`',
    (
        "vllm",
        "eagle3",
    ): '`--speculative-config \'{{"method": "eagle3", "model": "THIS FOLDER", "num_speculative_tokens": {block}}}\'`',
    (
        "sglang",
        "dspark",
    ): "`--speculative-algorithm DSPARK --speculative-draft-model-path THIS FOLDER`",
    (
        "sglang",
        "dflash",
    ): "`--speculative-algorithm DFLASH --speculative-draft-model-path THIS FOLDER`",
}
ANCHOR_FIRST = """
The anchor is this draft's first prediction slot (`dflash_config.sample_from_anchor: true`): {block} queries propose {block}
tokens. Engine versions that only know DFlash's other layout (1 + N queries, the anchor predicts nothing) refuse this
folder or accept next to nothing of it; look at the acceptance length after the first requests.
"""


def model_card(spec: DraftSpec, engine: Engine, *, source: Path) -> str:
    """The card's text; recipe, training data and acceptance are read from beside the draft
    where they can be reached.
    """
    target = target_name(spec)
    front = {
        "library_name": engine if engine != "hf" else "transformers",
        "tags": ["speculative-decoding", spec.algorithm],
    }
    front |= {"base_model": target} if target and not target.startswith(("/", ".")) else {}
    artifact = artifact_around(source)
    serve = SERVE.get(
        (engine, spec.algorithm),
        "Load it with `deepspec.model.checkpoint.load_draft`." if engine == "hf" else "",
    )
    note = (
        ANCHOR_FIRST.format(block=spec.block_size)
        if spec.algorithm == "dflash" and engine != "hf"
        else ""
    )
    sections = {
        f"{spec.algorithm} draft model for {Path(target).name or spec.family.name}": _facts(
            spec, engine
        ),
        "Serving": serve.format(block=spec.block_size) + "\n" + note,
        "Recipe": _recipe(artifact),
        "Training data": "\n".join(_lineage(artifact)) or UNKNOWN,
        "Measured acceptance": "\n".join(_acceptance(artifact))
        or "Unknown: no sealed evaluation of this draft was found beside it.",
    }
    body = [
        f"{'#' if number == 0 else '##'} {title}\n\n{text.strip()}\n"
        for number, (title, text) in enumerate(sections.items())
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(body)


def artifact_around(source: Path) -> Artifact | None:
    """The train artifact whose draft/ folder this is, if it is one."""
    folder = source.resolve().parent
    if source.name != "draft" or not (folder / "artifact.json").is_file():
        return None
    fields = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    info = ArtifactInfo.model_validate(fields)
    return Artifact(
        open_store(str(folder.parent.parent)),
        ArtifactKey(info.stage, info.name, info.fingerprint, info.recipe, info.inputs),
    )


def _facts(spec: DraftSpec, engine: Engine) -> str:
    facts: dict[str, Any] = {
        "written for": engine,
        "target": target_name(spec) or "not named in its config",
        "tokens proposed per round": spec.block_size,
        "decoder layers": spec.num_layers,
        "captured target layers (0-based, output after the layer)": list(spec.target_layer_ids),
        "mask token id": spec.mask_token_id,
        "Markov head": f"{spec.markov.kind}, rank {spec.markov.rank}" if spec.markov else "none",
        "confidence head": "yes" if spec.confidence else "none",
        "block layout": "slot k predicts anchor + 1 + k (`sample_from_anchor: true`)"
        if spec.algorithm != "eagle3"
        else "token by token",
    }
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in facts.items() if value is not None),
        ]
    )


def _recipe(artifact: Artifact | None) -> str:
    info = artifact.info() if artifact else None
    if info is None:
        return UNKNOWN
    return f"DeepSpec {info.code_version}:\n\n```yaml\n{yaml.safe_dump(info.recipe, sort_keys=False)}```"


def _lineage(artifact: Artifact | None) -> Iterator[str]:
    """One line per artifact that this draft was made from, and its manifest's digest."""
    info = artifact.info() if artifact else None
    if artifact is None or info is None:
        return
    for depth, found in chain(artifact.store, info):
        key = ArtifactKey(found.stage, found.name, found.fingerprint, {}, ())
        manifest = Artifact(artifact.store, key).manifest()
        seal = (
            f"digest `{manifest.digest}`, {manifest.totals['rows']} rows, {manifest.totals['tokens']} tokens"
            if manifest
            else "not sealed"
        )
        yield f"{'  ' * depth}- {found.stage} `{found.name}-{found.fingerprint}`: {seal}"


def _acceptance(artifact: Artifact | None) -> Iterator[str]:
    """The acceptance lengths of every sealed evaluation of this draft in its store."""
    if artifact is None:
        return
    store = artifact.store
    for folder in store.names("evaluate"):
        if not (
            store.exists(f"evaluate/{folder}/manifest.json")
            and store.exists(f"evaluate/{folder}/summary.json")
        ):
            continue
        info = ArtifactInfo.model_validate_json(store.read(f"evaluate/{folder}/artifact.json"))
        if artifact.key.as_input() not in info.inputs:
            continue
        summary = json.loads(store.read(f"evaluate/{folder}/summary.json"))
        lengths = ", ".join(
            f"{name} {value:.2f}" for name, value in summary["acceptance_length"].items()
        )
        yield f"- `evaluate/{folder}` at temperature {summary['temperature']}: tokens per round (bonus included) {lengths}"
