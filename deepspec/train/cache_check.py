"""Whether a cache is that of the run, field by field, before a weight is loaded.

Its path follows from the run's fingerprint, so a cache that differs was copied there, edited, or
written by another version. Each check returns what differs, by field, in words.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInput
from deepspec.artifacts.run import Run
from deepspec.cache.reader import SCHEMA, HiddenCache
from deepspec.config.data import HiddenConfig
from deepspec.config.families import text_config
from deepspec.config.target import TargetConfig
from deepspec.errors import ArtifactMismatch
from deepspec.hidden.metadata import CONFIG, TENSORS
from deepspec.target.chat import load_chat, target_folder

RECIPE = "artifact.json"
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")  # of a target's config.json


def check_cache(run: Run, cache: HiddenCache) -> None:
    """Refuse a cache whose target, layers, codec, number format or tokenizer are not the run's.

    Raises:
        ArtifactMismatch: names every field that differs, and both of its values.
    """
    folder = target_folder(run)
    found = _sizes(cache, folder)
    if folder:  # what a hub's model has is decided by its revision
        digests = load_chat(run).digests()
        found |= _different(_picked(cache.layout.metadata, digests), digests, file=SCHEMA)
    found |= _schema(run.config.target, run.config.hidden, cache)
    found |= _recipe(cache.artifact)  # counts where a field differs in the schema, too
    if found:
        raise ArtifactMismatch(
            f"the cache is not that of this run: {'; '.join(found.values())}",
            where=cache.artifact.url,
            fix=f"remove that folder and run `{run.command('hidden')}` again, or give the run the "
            "cache's values",
        )


def _recipe(artifact: Artifact) -> dict[str, str]:
    """What the cache was made with and from, as written down before its first shard."""
    info, key = artifact.info(), artifact.key
    if info is None:
        return {"recipe": f"the recipe is missing in its {RECIPE}"}
    return _different(
        _fields(info.recipe, info.format, info.inputs),
        _fields(key.recipe, key.format, key.inputs),
        file=RECIPE,
    )


def _schema(target: TargetConfig, hidden: HiddenConfig, cache: HiddenCache) -> dict[str, str]:
    """Whose states they are and how they are stored, which is how they are read."""
    context, last = cache.layout.context, cache.layout.last_hidden
    metadata = cache.layout.metadata
    found = {
        "target.model": metadata.get("target"),
        "target.revision": metadata.get("revision"),
        "target.layer_ids": json.loads(metadata.get("layers", "null")),
        "number of target.layer_ids": context.num_layers,
        "hidden.codec": context.name,
        "hidden.last_codec": last.name,
        "hidden.compression": context.compression,
    }
    wanted = {
        "target.model": target.model,
        "target.revision": str(target.revision),
        "target.layer_ids": list(target.layer_ids),
        "number of target.layer_ids": len(target.layer_ids),
        "hidden.codec": hidden.codec,
        "hidden.last_codec": hidden.codec_of_last_hidden,
        "hidden.compression": hidden.compression,
    }
    return _different(found, wanted, file=SCHEMA)


def _sizes(cache: HiddenCache, folder: Path | None) -> dict[str, str]:
    """The target's config in the cache against the states and the shapes of the frozen tensors.

    And against the target itself where it is a local folder.
    """
    artifact, layout = cache.artifact, cache.layout
    kept = text_config(json.loads(artifact.read(CONFIG)))
    size = kept.get("hidden_size")
    states = {
        "hidden_size of context": layout.context.hidden_size,
        "hidden_size of last_hidden": layout.last_hidden.hidden_size,
    }
    with safe_open(cache.file(TENSORS), framework="pt") as file:
        names = list(file.keys())
        shapes = {f"shape of {name}": file.get_slice(name).get_shape() for name in names}
    shape = [kept.get("vocab_size"), size]
    other = f"its {CONFIG}"
    found = _different(states, dict.fromkeys(states, size), file=SCHEMA, other=other)
    found |= _different(shapes, {name: shape for name in shapes}, file=TENSORS, other=other)
    if folder:
        own = text_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        found |= _different(_picked(kept, SIZES), _picked(own, SIZES), file=CONFIG)
    return found


def _different(
    found: Mapping[str, object], wanted: Mapping[str, object], *, file: str, other: str = "this run"
) -> dict[str, str]:
    return {
        name: f"{name} is {found.get(name)} in its {file}, {wanted.get(name)} in {other}"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    }


def _picked(values: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    return {name: values.get(name) for name in names}


def _fields(
    recipe: Mapping[str, Any], version: int, inputs: Sequence[ArtifactInput]
) -> dict[str, object]:
    """What an artifact is made with and from, a recipe's sections as `section.field`."""
    return {
        **{
            f"{section}.{field}": value
            for section, fields in recipe.items()
            for field, value in fields.items()
        },
        "format": version,
        "the input": [f"{entry.stage}/{entry.name}-{entry.fingerprint}" for entry in inputs],
    }
