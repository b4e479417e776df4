"""The house rules that a machine can check: floors, circles, forbidden imports, sizes."""

import ast
import graphlib
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A package imports only packages of lower floors; a floor's own packages stand beside each other.
FLOORS = (
    {"errors", "formatting", "messages", "figures"},
    {"config", "storage", "process"},
    {"artifacts", "model"},
    {"target", "cache", "prompts", "export", "demo", "serving"},
    {"answers", "hidden", "evaluate"},
    {"train", "plan", "report"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
LIGHT = ("config", "storage", "artifacts", "process", "figures", "errors", "formatting", "messages")
HEAVY = {
    "model",
    "target",
    "cache",
    "prompts",
    "export",
    "demo",
    "answers",
    "hidden",
    "evaluate",
    "train",
}
FILES = sorted([*(ROOT / "deepspec").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
    return found


IMPORTS = {name: imports(path) - {"deepspec"} for name, path in MODULES.items()}
LIBRARY = [name for name in MODULES if name.startswith("deepspec.")]
FLOWS = [name for name in MODULES if name.startswith("flows.")]


def package_of(name: str) -> str:
    return name.split(".")[1]


def outside_libraries(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in IMPORTS[name]}


def test_every_package_has_a_floor():
    assert {package_of(name) for name in LIBRARY} == set(FLOOR_OF)
    assert len(FLOORS) <= 8


def test_imports_point_down():
    upward = [
        f"{name} -> {imported}"
        for name in LIBRARY
        for imported in IMPORTS[name] & set(LIBRARY)
        if package_of(name) != package_of(imported)
        and FLOOR_OF[package_of(imported)] >= FLOOR_OF[package_of(name)]
    ]
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imported & set(MODULES) for name, imported in IMPORTS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_library_never_imports_prefect_or_flows():
    assert [name for name in LIBRARY if outside_libraries(name) & {"prefect", "flows"}] == []


def test_light_packages_and_flows_never_import_torch():
    light = [name for name in LIBRARY if package_of(name) in LIGHT]
    arithmetic = ["deepspec.plan.parts", "deepspec.plan.forecast", "deepspec.plan.view"]
    torch = {"torch", "transformers", "safetensors"}
    checked = [*light, *arithmetic, *FLOWS]
    assert [name for name in checked if outside_libraries(name) & torch] == []


def test_flows_reach_heavy_work_only_through_launch():
    reached = {
        name: {i for i in IMPORTS[name] & set(LIBRARY) if package_of(i) in HEAVY} for name in FLOWS
    }
    assert {name: found for name, found in reached.items() if found} == {}


def test_nothing_unpickles():
    calls = {"torch.load", "pickle", "gather_object", "broadcast_object"}
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert [str(path) for path, text in texts.items() if any(call in text for call in calls)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_the_head(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            assert num_lines <= 60, f"{node.name} is longer than 60 lines"


def test_few_functions_take_the_whole_configuration():
    """Others take the section, the artifact or the number that they work with."""
    taking = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None and "RunConfig" in ast.unparse(argument.annotation)
    ]
    assert len(taking) <= 40, taking


def test_the_library_stays_small():
    """Code tokens, a docstring counting one; who adds raises the number and gives the reason."""
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    num_tokens = sum(
        token.type not in layout
        for name in LIBRARY
        for token in tokenize.generate_tokens(io.StringIO(MODULES[name].read_text()).readline)
    )
    assert num_tokens <= 182_700
