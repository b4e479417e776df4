"""The configuration reference is what the models are now, and has every field."""

import re
from typing import Any

from deepspec.config.recipes import load_run, recipe_names
from deepspec.config.run import RunConfig
from docs.reference import PAGE, page, places

ROW = re.compile(r"^\| `([^`]+)` \| (.*) \| (.*) \| (.*) \|$", re.MULTILINE)


def keys(value: Any, path: str = "") -> set[str]:
    """Paths of all settings in a run as it is shown."""
    if isinstance(value, dict) and value:
        return set().union(*(keys(below, f"{path}.{name}") for name, below in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(keys(below, f"{path}[]") for below in value))
    return {path.removeprefix(".")}


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_setting_of_every_recipe_is_there_with_its_meaning():
    meanings = {path: meaning for path, _, _, meaning in ROW.findall(page())}
    shown = set().union(*(keys(load_run(name).model_dump(mode="json")) for name in recipe_names()))
    assert shown <= set(meanings)
    assert not [path for path, meaning in meanings.items() if not meaning]


def test_a_row_has_the_default_and_what_is_allowed():
    rows = {path: (default, values) for path, default, values, _ in ROW.findall(page())}
    assert rows["resources.retries.times"] == ("`3`", "integer, at least 0")
    assert rows["hidden.last_codec"] == ("`null`", "`raw`, `lossless`, `int8` or `null`")
    assert rows["evaluate.benchmarks[].name"] == ("required", "string")
    assert rows["target.model"][0] == "required"


def test_each_model_of_a_choice_has_a_heading_of_its_own():
    found = {(place.path, place.choice) for place in places(RunConfig)}
    assert {("draft", "algorithm: eagle3"), ("prompts.source", "kind: files")} <= found
