"""Finding, merging and overriding run configurations, with errors that name the field and the
nearest right word.

A recipe is an algorithm row laid over a target row, and both over the protocol that all share:
`dspark-qwen3-4b` is `recipes/protocol.yaml`, `recipes/targets/qwen3-4b.yaml` and
`recipes/algorithms/dspark.yaml`. A run file may name the recipe it starts from under `recipe:`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError

DEFAULT_ALGORITHM = "dspark"  # `demo` alone means `dspark-demo`


def recipe_names() -> list[str]:
    return [
        f"{algorithm}-{target}" for target in _rows("targets") for algorithm in _rows("algorithms")
    ]


def load_run(source: str, overrides: Sequence[str] = (), *, store: str | None = None) -> RunConfig:
    """The run that a recipe name or a YAML file describes, with `key.path=value` overrides applied.

    Raises:
        ConfigError: unknown recipe, key or value; all wrong fields are named at once.
    """
    fields = (
        _read_run_file(Path(source))
        if source.endswith((".yaml", ".yml"))
        else recipe_fields(source)
    )
    fields = {**fields, "store": store} if store is not None else fields
    fix = f"`python -m deepspec show-config {source.split('=')[0]}` prints every field; correct the ones named above"
    config = validated(fields, overrides, where=source, fix=fix)
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
        what = f"{where}: " + "; ".join(_explain(detail) for detail in _causes(error))
        raise ConfigError(what, where=where, fix=fix) from None


def recipe_fields(name: str) -> dict[str, Any]:
    """The merged rows of a recipe, not yet validated."""
    if name in _rows("targets"):
        name = f"{DEFAULT_ALGORITHM}-{name}"
    algorithm, _, target = name.partition("-")
    if name not in recipe_names():
        raise ConfigError(
            f"there is no recipe {name!r}" + _nearest(name, [*recipe_names(), *_rows("targets")]),
            where="recipe name",
            fix="choose one of: "
            + ", ".join(recipe_names())
            + "; or give a run file ending in .yaml",
        )
    fields = merge(
        merge(_rows()["protocol"], _rows("targets")[target]), _rows("algorithms")[algorithm]
    )
    fields = merge(fields, fields.pop("per_algorithm", {}).get(algorithm, {}))
    return {"name": name, "store": "store", **fields}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `top` laid over it, mapping by mapping; anything else, and a source of
    another kind, replaces what was there.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if (
            isinstance(below, Mapping)
            and isinstance(value, Mapping)
            and not (key == "source" and _other_kind(below, value))
        ):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _other_kind(below: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "kind" in value and value["kind"] != below.get("kind")


def parse_override(text: str) -> dict[str, Any]:
    """`train.lr=3e-4` as nested mappings; the value is read as YAML."""
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _rows(*kind: str) -> dict[str, dict[str, Any]]:
    folder = files("deepspec").joinpath("recipes", *kind)
    rows = sorted(
        (item for item in folder.iterdir() if item.name.endswith(".yaml")),
        key=lambda item: item.name,
    )
    return {
        row.name.removesuffix(".yaml"): yaml.safe_load(row.read_text(encoding="utf-8"))
        for row in rows
    }


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the run file cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the run file is not valid YAML: {error}",
            where=str(path),
            fix="correct the line named",
        ) from None
    if not isinstance(fields, dict):
        raise ConfigError(
            "the run file holds no settings", where=str(path), fix="start it with `recipe: demo`"
        )
    recipe = fields.pop("recipe", None)
    return merge(recipe_fields(str(recipe)), fields) if recipe is not None else fields


def _causes(error: ValidationError) -> list[Any]:
    """The errors without those that follow from others: a list is no shorter for an entry that
    is wrong.
    """
    found = error.errors()
    around = {detail["loc"][:end] for detail in found for end in range(len(detail["loc"]))}
    return [
        detail for detail in found if detail["type"] != "too_short" or detail["loc"] not in around
    ]


def _explain(detail: Any) -> str:
    loc = [str(part) for part in detail["loc"]]
    field = (
        ".".join(
            part for index, part in enumerate(loc) if not (index and loc[index - 1] in _UNIONS)
        )
        or "run"
    )
    if detail["type"] == "extra_forbidden":
        allowed = _allowed_fields(loc[:-1])
        return f"{field}: there is no such field{_nearest(loc[-1], allowed)}; allowed here: {', '.join(allowed)}"
    given = "" if detail["type"] in ("missing", "value_error") else f" (given: {detail['input']!r})"
    message = detail["msg"].removeprefix("Value error, ")
    expected = str(detail.get("ctx", {}).get("expected", "")).replace("'", "")
    nearest = (
        _nearest(str(detail["input"]), expected.replace(" or ", ", ").split(", "))
        if expected
        else ""
    )
    return f"{field}: {message}{nearest}{given}"


_UNIONS = ("draft", "source")  # behind these pydantic puts the union's tag into the path


def _allowed_fields(loc: Iterable[str]) -> list[str]:
    """Names of the fields of the section at a pydantic error's location, union tags included."""
    schema: dict[str, Any] = RunConfig.model_json_schema()
    node = schema
    for key in loc:
        variants = node.get("discriminator", {}).get("mapping", {})
        if key in variants:
            node = {"$ref": variants[key]}
        elif not key.isdigit():
            node = node.get("properties", {}).get(key, {})
        node = _resolve(node, schema)
    return sorted(node.get("properties", {}))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """What a node stands for: behind a reference, a list, or `section or null`."""
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    if "items" in node:
        return _resolve(node["items"], schema)
    sections = [option for option in node.get("anyOf", []) if "$ref" in option]
    return _resolve(sections[0], schema) if sections else node


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def section_of(config: BaseModel) -> dict[str, Any]:
    """A config section as plain JSON values, for fingerprints and records."""
    return config.model_dump(mode="json")
