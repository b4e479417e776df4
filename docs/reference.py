"""Writes docs/configuration.md: every field of a run, taken from the models that check it.

`python -m docs.reference` writes the page, `--check` only compares it with the models.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic_core import to_jsonable_python

from deepspec.config.run import RunConfig
from deepspec.config.section import Section, sections_in

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

A run is a recipe (`python -m deepspec recipes` lists them) with some fields set otherwise: in a run
file that names it under `recipe:`, or with `--set PATH=VALUE`, where the value is YAML. Recipes set
some of these fields themselves: `python -m deepspec show-config RUN` prints the whole of a run.
Unknown keys and values out of range are refused with the field's path.

Every section but `resources` decides what the result is: a changed value gives its artifacts
another fingerprint, and so another folder. `resources` (and `train.strategy`) is about how the work
is done; it can differ from one command to the next.

`make docs` writes this page from the models; `make check` compares.
"""


class Place(NamedTuple):
    """A section at its path in a run; `choice` is what selects it among the models of a union."""

    path: str
    model: type[Section]
    choice: str = ""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *map(_section, places(RunConfig))])


def places(model: type[Section], path: str = "", choice: str = "") -> Iterator[Place]:
    """A section and those inside it, in the order of the fields."""
    yield Place(path, model, choice)
    for name, field in model.model_fields.items():
        for inner in sections_in(field.annotation):
            tag = str(field.discriminator or "")
            chosen = " or ".join(get_args(inner.model_fields[tag].annotation)) if tag else ""
            below = f"{path}.{name}".removeprefix(".") + _index(field.annotation)
            yield from places(inner, below, f"{tag}: {chosen}" if tag else "")


def _index(annotation: Any) -> str:
    return {tuple: "[]", dict: ".STAGE"}.get(get_origin(annotation), "")


def _section(place: Place) -> str:
    schema = place.model.model_json_schema()
    title = f"`{place.path}`" if place.path else "The run"
    lines = [
        f"## {title}" + (f" ({place.choice})" if place.choice else ""),
        "",
        _one_line(place.model.__doc__),
        "",
        "| field | default | values | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in place.model.model_fields.items():
        path = f"{place.path}.{name}".removeprefix(".")
        default = field.get_default(call_default_factory=True)
        inner = sections_in(field.annotation)
        if field.is_required():
            shown = "required"
        else:
            shown = "" if isinstance(default, Section) else f"`{_yaml(default)}`"
        cells = (
            f"`{path}`",
            shown,
            _values(schema["properties"][name], schema.get("$defs", {})),
            _one_line(field.description or inner[0].__doc__),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _values(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a field may hold, in words, from its JSON schema."""
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[-1]]
    if options := node.get("anyOf", node.get("oneOf")):
        return " or ".join(dict.fromkeys(_values(option, definitions) for option in options))
    if "const" in node or "enum" in node:
        return ", ".join(f"`{_yaml(value)}`" for value in node.get("enum", [node.get("const")]))
    kind = node["type"]
    if kind == "array":
        return f"list: {_values(node['items'], definitions)}"
    if kind == "object":
        return "a section by stage" if "propertyNames" in node else "section"
    named = {"boolean": "`true`, `false`", "null": "`null`"}
    return named.get(kind, f"{kind}{_range(node)}")


def _range(node: Mapping[str, Any]) -> str:
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    parts = [f"{word} {node[key]:g}" for key, word in bounds.items() if key in node]
    return f", {', '.join(parts)}" if parts else ""


def _yaml(value: Any) -> str:
    return yaml.safe_dump(to_jsonable_python(value), default_flow_style=True).split("\n")[0]


def main() -> int:
    """0 where the page is up to date, or was written."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="compare, write nothing")
    if not arguments.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    sys.stderr.write(f"{PAGE.name} differs from the models: run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
