"""The house rules that a machine can check: floors, no forbidden imports, sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "errors": 1, "events": 1, "guard": 1, "ports": 1, "__init__": 1,
    "store": 2, "disk": 2, "remote": 2, "bucket": 2, "bucket_calls": 2, "bucket_fsspec": 2, "bucket_obstore": 2, "gc": 2,
    "records": 2, "benchmark_sets": 2, "work": 2, "artifact": 2, "aside": 2, "lineage": 2, "provenance": 2, "stages": 2, "verify": 2,
    "config": 2, "data_config": 2, "draft_config": 2, "resources_config": 2, "recipe": 2, "families": 2, "launch": 2,
    "claims": 2, "shards": 2, "plan": 2, "cheapest": 2, "forecast": 2, "plan_view": 2, "terminal": 2, "gpus": 2,
    "figures": 2, "picture": 2, "curves": 2,
    "model": 3, "target": 3, "generate": 3,
    "data": 4,
    "train": 5, "eval": 5, "demo": 5,
    "__main__": 6, "verbs": 6,
}  # fmt: skip
LIGHT = {name for name, floor in FLOORS.items() if floor <= 2}
FILES = sorted([*(ROOT / "deepspec").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "deepspec").with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_imports(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def deepspec_modules(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("deepspec.") and name.split(".")[1] in FLOORS}
    return names - {"__init__"}


LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "deepspec")]
FLOWS = [path for path in FILES if path.is_relative_to(ROOT / "flows")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_never_point_up(path: Path):
    own = module_of(path)
    above = {name for name in deepspec_modules(path) if FLOORS[name] > FLOORS[own]}
    beside = {name for name in deepspec_modules(path) if FLOORS[own] == 5 == FLOORS[name] and name != own and own != "demo"}
    assert not above | beside


def test_the_library_never_imports_prefect_or_flows():
    assert [str(path) for path in LIBRARY if top_imports(path) & {"prefect", "flows"}] == []


def test_light_modules_and_flows_never_import_torch():
    light = [path for path in LIBRARY if module_of(path) in LIGHT]
    assert [str(path) for path in [*light, *FLOWS] if top_imports(path) & {"torch", "transformers", "safetensors"}] == []


def test_flows_reach_heavy_work_only_through_launch():
    heavy = {name for name, floor in FLOORS.items() if floor >= 3}
    assert [str(path) for path in FLOWS if deepspec_modules(path) & heavy] == []


def test_nothing_unpickles():
    calls = {"torch.load", "pickle"}
    assert [str(path) for path in FILES if any(word in path.read_text(encoding="utf-8") for word in calls)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_the_head(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{node.name} is longer than 60 lines"
