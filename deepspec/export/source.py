"""The draft to export: where it lies, what made it, and what is known of its target."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import artifact_at, chain
from deepspec.config.families import text_config
from deepspec.model.spec import DraftSpec


class DraftSource(NamedTuple):
    """A draft's folder, and the train artifact around it where it still lies in its store."""

    folder: Path
    artifact: Artifact | None


def find_draft(draft: Path | str) -> DraftSource:
    """The draft of a folder, or of the train artifact (a folder or URL) that holds it."""
    if "://" in str(draft) and (artifact := artifact_at(str(draft))):
        return DraftSource(artifact.fetch_folder("draft"), artifact)
    given = Path(draft)
    folder = given if (given / "config.json").is_file() else given / "draft"
    around = folder.resolve().parent
    is_whole = folder.name == "draft" and (around / "artifact.json").is_file()
    found = artifact_at(str(around)) if is_whole else None
    return DraftSource(folder, found if found and found.info() else None)


def with_target(spec: DraftSpec, artifact: Artifact | None) -> DraftSpec:
    """The spec whose text config names its target as a server finds it.

    `_name_or_path` is a name on the hub, or the absolute path of a folder that is here, or empty;
    `target_architectures` and `target_dtype` are those of the folder's config where there is one.
    What an older draft's config lacks comes from the recipes in its store.
    """
    text, steps = dict(spec.text_config), list(chain(artifact)) if artifact else []
    recipes = (info.recipe["target"] for *_, info in steps if "target" in info.recipe)
    recorded: dict[str, Any] = next(recipes, {})
    name = text.pop("target_model_name_or_path", None) or text.get("_name_or_path")
    name = name or recorded.get("model", "")
    folder = Path(name) if name else None
    if name == "demo":  # the store's own, or of a store that is elsewhere
        demos = (made.fetch_folder("target") for _, made, info in steps if info.stage == "demo")
        name, folder = "", next(demos, None)
    own: dict[str, Any] = {}
    if folder and (file := folder.resolve() / "config.json").is_file():
        name, own = str(file.parent), json.loads(file.read_text(encoding="utf-8"))
    model_type = text.get("target_model_type") or text.get("model_type", "")
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    dtype = own.get("dtype") or own.get("torch_dtype") or text_config(own).get("dtype")
    known = {
        "_name_or_path": name,
        "target_architectures": own.get("architectures")
        or text.get("target_architectures")
        or ([usual] if usual else None),
        "target_dtype": dtype or text.get("target_dtype") or recorded.get("dtype"),
    }
    known = {key: value for key, value in known.items() if value is not None}
    return replace(spec, text_config=text | known)


def target_name(spec: DraftSpec) -> str:
    """The name or path of the target, empty where nothing records it."""
    return str(spec.text_config["_name_or_path"])
