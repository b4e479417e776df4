"""Finding, merging and overriding run configurations.

A recipe is an algorithm row laid over a target row, and both over the protocol that all share:
`dspark-qwen3-4b` is `recipes/protocol.yaml`, `recipes/targets/qwen3-4b.yaml` and
`recipes/algorithms/dspark.yaml`. A run file may name the recipe it starts from under `recipe:`.
What is wrong with a run is explained by the field's path, what is allowed, and the nearest right
name.
"""

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deepspec.config.run import RunConfig
from deepspec.config.section import Section, nearest, sections_in
from deepspec.errors import ConfigError

RECIPES = files("deepspec").joinpath("recipes")
UNIONS = ("draft", "source")  # after these names pydantic puts the union's tag into a path
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
        raise ConfigError(f"{where}: {_explained(error)}", where=where, fix=fix) from None


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


def _explained(error: ValidationError) -> str:
    """All wrong fields of a run, each with its reason."""
    found = error.errors()
    around = {detail["loc"][:end] for detail in found for end in range(len(detail["loc"]))}
    # a list is no shorter for an entry that is wrong
    causes = [
        detail for detail in found if detail["type"] != "too_short" or detail["loc"] not in around
    ]
    return "; ".join(map(_cause, causes))


def _cause(detail: ErrorDetails) -> str:
    loc = [str(part) for part in detail["loc"]]
    shown = [part for before, part in zip(["", *loc], loc, strict=False) if before not in UNIONS]
    field = ".".join(shown) or "run"
    if detail["type"] == "extra_forbidden":
        allowed = _allowed_fields(loc[:-1])
        meant = nearest(loc[-1], allowed)
        return f"{field}: there is no such field{meant}; allowed here: {', '.join(allowed)}"
    message = detail["msg"].removeprefix("Value error, ")
    if expected := str(detail.get("ctx", {}).get("expected", "")).replace("'", ""):
        message += nearest(str(detail["input"]), expected.replace(" or ", ", ").split(", "))
    if detail["type"] not in ("missing", "value_error"):
        message += f" (given: {detail['input']!r})"
    return f"{field}: {message}"


def _allowed_fields(loc: Sequence[str]) -> list[str]:
    """Names of the fields of the section at an error's location."""
    sections: list[type[Section]] = [RunConfig]
    for key in loc:
        fields = [section.model_fields[key] for section in sections if key in section.model_fields]
        inner = [section for field in fields for section in sections_in(field.annotation)]
        # else the key is the tag of one of a union's sections, the index of a list, or a stage
        sections = (
            inner or [section for section in sections if _is_tagged(section, key)] or sections
        )
    return sorted({name for section in sections for name in section.model_fields})


def _is_tagged(section: type[Section], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())
