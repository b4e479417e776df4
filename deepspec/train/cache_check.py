"""Whether a cache is that of the run, field by field, before a weight is loaded.

Its path follows from the run's fingerprint, so a cache that differs was copied there, edited, or
written by another version. Each check returns what differs, by field, in words.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInfo, ArtifactKey
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
        kept, digests = cache.layout.metadata, load_chat(run).digests()
        both = {name: (kept.get(name), digest) for name, digest in digests.items()}
        found |= _different(both, file=SCHEMA)
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
    info = artifact.info()
    if info is None:
        return {"recipe": f"the recipe is missing in its {RECIPE}"}
    found, wanted = _fields(info), _fields(artifact.key)
    both = {name: (found.get(name), wanted.get(name)) for name in found | wanted}
    return _different(both, file=RECIPE)


def _schema(target: TargetConfig, hidden: HiddenConfig, cache: HiddenCache) -> dict[str, str]:
    """Whose states they are and how they are stored, which is how they are read."""
    metadata, context = cache.layout.metadata, cache.layout.context
    layers = list(target.layer_ids)
    both = {
        "target.model": (metadata.get("target"), target.model),
        "target.revision": (metadata.get("revision"), str(target.revision)),
        "target.layer_ids": (json.loads(metadata.get("layers", "null")), layers),
        "number of target.layer_ids": (context.num_layers, len(layers)),
        "hidden.codec": (context.name, hidden.codec),
        "hidden.last_codec": (cache.layout.last_hidden.name, hidden.codec_of_last_hidden),
        "hidden.compression": (context.compression, hidden.compression),
    }
    return _different(both, file=SCHEMA)


def _sizes(cache: HiddenCache, folder: Path | None) -> dict[str, str]:
    """The target's config in the cache against the states and the shapes of the frozen tensors.

    And against the target itself where it is a local folder.
    """
    artifact, layout = cache.artifact, cache.layout
    kept = text_config(json.loads(artifact.read(CONFIG)))
    size, other = kept.get("hidden_size"), f"its {CONFIG}"
    states = {
        "hidden_size of context": (layout.context.hidden_size, size),
        "hidden_size of last_hidden": (layout.last_hidden.hidden_size, size),
    }
    with safe_open(cache.file(TENSORS), framework="pt") as file:
        shapes = {
            f"shape of {name}": (file.get_slice(name).get_shape(), [kept.get("vocab_size"), size])
            for name in file.keys()  # noqa: SIM118 - it is no mapping
        }
    found = _different(states, file=SCHEMA, other=other)
    found |= _different(shapes, file=TENSORS, other=other)
    if folder:
        own = text_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        both = {name: (kept.get(name), own.get(name)) for name in SIZES}
        found |= _different(both, file=CONFIG)
    return found


def _different(
    both: Mapping[str, tuple[object, object]], *, file: str, other: str = "this run"
) -> dict[str, str]:
    return {
        name: f"{name} is {found} in its {file}, {wanted} in {other}"
        for name, (found, wanted) in both.items()
        if found != wanted
    }


def _fields(made: ArtifactInfo | ArtifactKey) -> dict[str, object]:
    """What an artifact is made with and from, a recipe's sections as `section.field`."""
    fields = {
        f"{section}.{field}": value
        for section, values in made.recipe.items()
        for field, value in values.items()
    }
    inputs = [f"{entry.stage}/{entry.name}-{entry.fingerprint}" for entry in made.inputs]
    return {**fields, "format": made.format, "the input": inputs}
