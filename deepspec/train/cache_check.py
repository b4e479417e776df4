"""Before a weight is loaded: whether a cache is the one that the run is to train on, field by
field.

Its path follows from the run's fingerprint, so a cache that differs was copied there, edited, or
written by another version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import safe_open

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInput
from deepspec.artifacts.run import Run
from deepspec.cache.reader import SCHEMA, HiddenCache
from deepspec.config.families import text_config
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch
from deepspec.hidden.metadata import CONFIG, TENSORS
from deepspec.target.chat import load_chat, target_folder

RECIPE = "artifact.json"
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")  # of a target's config.json


class Difference(NamedTuple):
    """A field that is one thing in a file of the cache, and another where it should be the same."""

    field: str
    found: object
    file: str
    wanted: object
    other: str = "this run"

    def __str__(self) -> str:
        return f"{self.field} is {self.found} in its {self.file}, {self.wanted} in {self.other}"


def check_cache(run: Run, cache: HiddenCache) -> None:
    """Refuse a cache of another target, other layers, codec, number format or tokenizer than the
    run's.

    Raises:
        ArtifactMismatch: names every field that differs, and both of its values.
    """
    config = run.config
    found = [
        *_recipe(cache.artifact),
        *_schema(config, cache),
        *_sizes(run, cache),
        *_tokenizer(run, cache),
    ]
    # of each field, the difference that was found first
    first = {difference.field: difference for difference in reversed(found)}
    if first:
        what = "the cache is not that of this run: " + "; ".join(
            str(difference) for difference in reversed(first.values())
        )
        fix = "remove that folder and run `python -m deepspec hidden` again, or give the run the cache's values"
        raise ArtifactMismatch(what, where=cache.artifact.url, fix=fix)


def _recipe(artifact: Artifact) -> Iterator[Difference]:
    """What the cache was made with and from, as it was written down before its first shard."""
    info, key = artifact.info(), artifact.key
    if info is None:
        yield Difference("the recipe", "missing", RECIPE, "needed")
        return
    yield from _different(_fields(info.recipe), _fields(key.recipe), file=RECIPE)
    found = {"format": info.format, "the input": _folders(info.inputs)}
    yield from _different(
        found, {"format": key.format, "the input": _folders(key.inputs)}, file=RECIPE
    )


def _schema(config: RunConfig, cache: HiddenCache) -> Iterator[Difference]:
    """Whose states they are and how they are stored, which is how they are read."""
    context, last, said = cache.layout.context, cache.layout.last_hidden, cache.layout.metadata
    target, hidden = config.target, config.hidden
    found = {
        "target.model": said.get("target"),
        "target.revision": said.get("revision"),
        "target.layer_ids": json.loads(said.get("layers", "null")),
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
    yield from _different(found, wanted, file=SCHEMA)


def _sizes(run: Run, cache: HiddenCache) -> Iterator[Difference]:
    """The target's config against the states, the embedding and lm_head (only their shapes),
    and the target itself where it is here.
    """
    artifact, layout = cache.artifact, cache.layout
    kept = text_config(json.loads(artifact.store.read(artifact.path(CONFIG))))
    vocab_size, hidden_size = kept.get("vocab_size"), kept.get("hidden_size")
    states = {
        "hidden_size of context": layout.context.hidden_size,
        "hidden_size of last_hidden": layout.last_hidden.hidden_size,
    }
    yield from _different(
        states, dict.fromkeys(states, hidden_size), file=SCHEMA, other=f"its {CONFIG}"
    )
    tensors = artifact.store.fetch(artifact.path(TENSORS), cache.manifest.files[TENSORS].checksum)
    with safe_open(tensors, framework="pt") as file:
        shapes = {f"shape of {name}": file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    yield from _different(
        shapes,
        {name: [vocab_size, hidden_size] for name in shapes},
        file=TENSORS,
        other=f"its {CONFIG}",
    )
    if folder := target_folder(run):
        own = text_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        yield from _different(
            {name: kept.get(name) for name in SIZES},
            {name: own.get(name) for name in SIZES},
            file=CONFIG,
        )


def _tokenizer(run: Run, cache: HiddenCache) -> Iterator[Difference]:
    """Vocabulary and chat template, where the target is a local folder; what a hub's model has
    is decided by its revision.
    """
    if target_folder(run):
        wanted = load_chat(run).digests()
        yield from _different(
            {name: cache.layout.metadata.get(name) for name in wanted}, wanted, file=SCHEMA
        )


def _different(
    found: Mapping[str, object], wanted: Mapping[str, object], *, file: str, other: str = "this run"
) -> Iterator[Difference]:
    for field in dict.fromkeys([*found, *wanted]):
        if found.get(field) != wanted.get(field):
            yield Difference(field, found.get(field), file, wanted.get(field), other)


def _fields(recipe: Mapping[str, Any]) -> dict[str, object]:
    """A recipe's sections as one mapping of `section.field`."""
    return {
        f"{section}.{field}": value
        for section, fields in recipe.items()
        for field, value in fields.items()
    }


def _folders(inputs: Sequence[ArtifactInput]) -> list[str]:
    return [f"{entry.stage}/{entry.name}-{entry.fingerprint}" for entry in inputs]
