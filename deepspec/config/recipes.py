"""Finding, merging and overriding run configurations.

A recipe is an algorithm row laid over a target row, and both over the protocol that all share:
`dspark-qwen3-4b` is `recipes/protocol.yaml`, `recipes/targets/qwen3-4b.yaml` and
`recipes/algorithms/dspark.yaml`. A run file may name the recipe it starts from under `recipe:`.
"""

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deepspec.config.invalid import explain
from deepspec.config.run import RunConfig
from deepspec.config.section import nearest
from deepspec.errors import ConfigError

RECIPES = files("deepspec").joinpath("recipes")
DEFAULT_ALGORITHM = "dspark"  # `demo` alone means `dspark-demo`


def recipe_names() -> list[str]:
    """All recipes: every algorithm for every target."""
    return [
        f"{algorithm}-{target}" for target in _rows("targets") for algorithm in _rows("algorithms")
    ]


def load_run(source: str, overrides: Sequence[str] = (), *, store: str | None = None) -> RunConfig:
    """The run that a recipe name or a YAML file describes, with `key.path=value` overrides applied.

    Raises:
        ConfigError: unknown recipe, key or value; all wrong fields are named at once.
    """
    is_file = source.endswith((".yaml", ".yml"))
    fields = _read_run_file(Path(source)) if is_file else recipe_fields(source)
    if store is not None:
        fields["store"] = store
    shown = f"`python -m deepspec show-config {source.split('=')[0]}` prints every field"
    config = validated(
        fields, overrides, where=source, fix=f"{shown}; correct the ones named above"
    )
    sets = [part for override in overrides for part in ("--set", override)]
    vars(config)["typed"] = shlex.join([source, *sets, *(("--store", store) if store else ())])
    return config


def validated(
    fields: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str, fix: str
) -> RunConfig:
    """The run of these fields, with `key.path=value` overrides applied.

    Raises:
        ConfigError: unknown key or value; all wrong fields are named at once.
    """
    for override in overrides:
        fields = merge(fields, parse_override(override))
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}", where=where, fix=fix) from None


def recipe_fields(name: str) -> dict[str, Any]:
    """The merged rows of a recipe, not yet validated.

    Raises:
        ConfigError: there is no such recipe.
    """
    targets, names = _rows("targets"), recipe_names()
    if name in targets:
        name = f"{DEFAULT_ALGORITHM}-{name}"
    if name not in names:
        raise ConfigError(
            f"there is no recipe {name!r}{nearest(name, [*names, *targets])}",
            where="recipe name",
            fix=f"choose one of: {', '.join(names)}; or give a run file ending in .yaml",
        )
    algorithm, _, target = name.partition("-")
    protocol = yaml.safe_load(RECIPES.joinpath("protocol.yaml").read_text(encoding="utf-8"))
    fields = merge(merge(protocol, targets[target]), _rows("algorithms")[algorithm])
    fields = merge(fields, fields.pop("per_algorithm", {}).get(algorithm, {}))
    return {"name": name, "store": "store", **fields}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `top` laid over it, mapping by mapping; any other value replaces the one below.

    A source of another kind replaces the whole of the one below, too.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            kind = below.get("kind")
            if key != "source" or value.get("kind", kind) == kind:
                value = merge(below, value)
        merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`train.lr=3e-4` as nested mappings; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{text!r} is not of the form section.field=value",
            where="--set",
            fix="for example --set train.lr=3e-4",
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(
            f"the value of {path} is not valid YAML: {value!r}",
            where="--set",
            fix="quote the value",
        ) from None
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


def to_yaml(config: RunConfig) -> str:
    """The whole run, ready to be read as a run file."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _rows(kind: str) -> dict[str, dict[str, Any]]:
    texts = {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8")
        for path in RECIPES.joinpath(kind).iterdir()
    }
    return {name: yaml.safe_load(text) for name, text in sorted(texts.items())}


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the run file cannot be read: {error}",
            where=str(path),
            fix="check the path, or correct the line named",
        ) from None
    if not isinstance(fields, dict):
        raise ConfigError(
            "the run file holds no settings", where=str(path), fix="start it with `recipe: demo`"
        )
    recipe = fields.pop("recipe", None)
    return merge(recipe_fields(str(recipe)), fields) if recipe is not None else fields


def section_of(config: BaseModel) -> dict[str, Any]:
    """A config section as plain JSON values, for fingerprints and records."""
    return config.model_dump(mode="json")
