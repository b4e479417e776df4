"""The pages cannot rot: what they name exists, their links lead somewhere, their example runs."""

import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
NAME = re.compile(r"`((?:deepspec|flows)(?:\.\w+)+)`")
FOLDER = re.compile(r"`((?:deepspec|flows|tests|benchmarks|deployments)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
# Run files and messages may name what is no module.
NOT_NAMES = {"deepspec.hidden"}


def exists(dotted: str) -> bool:
    """Whether a module, or an attribute of one (also of a class), has this name."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_modules_and_functions_on_a_page_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    assert [name for name in NAME.findall(text) if not exists(name)] == []
    assert [path for path in FOLDER.findall(text) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_stays_short():
    assert len((REPOSITORY / "README.md").read_bytes()) <= 9_000


def test_every_page_is_linked_from_the_readme_or_a_page():
    linked = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text(encoding="utf-8"))
    }
    assert [page.name for page in PAGES if page not in linked and page.name != "README.md"] == []


def test_the_python_example_runs(store: Path, capsys: pytest.CaptureFixture[str]):
    """The first block of docs/python.md, on the tiny demo instead of the whole one."""
    from tests.conftest import TINY

    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace('["prompts.limit=8"', f'[*{list(TINY)!r}, "prompts.limit=8"')
    exec(code.replace('store="store"', f"store={str(store)!r}"), {})
    assert capsys.readouterr().out.startswith("8 answers in ")
