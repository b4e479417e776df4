"""The table of memory in docs/gpu.md is what the arithmetic gives today.

`python -m tests.target.test_memory_table` prints it.
"""

from deepspec.config.recipes import load_run, recipe_names
from deepspec.model.memory import GPU_SHARE
from deepspec.target.gpu_room import fitting_rows, fitting_training
from deepspec.target.peak_memory import StageMemory
from tests.conftest import REPOSITORY
from tests.target.recipe_targets import TARGETS

GPUS = (24, 48, 80, 141)  # GB


def row(recipe: str) -> str:
    """A recipe's line of the table."""
    stages = StageMemory(load_run(recipe, store="none"), TARGETS[recipe.partition("-")[2]])
    fits = [fitting_training(stages, GPU_SHARE * 1e9 * gpu, ranks=1) for gpu in GPUS]
    rows = [fitting_rows(stages.answers, GPU_SHARE * 1e9 * gpu) for gpu in GPUS]
    most = stages.memory.answer_rows
    cells = [
        f"{stages.step.num_trained / 1e6:.0f}",
        f"{stages.training() / 1e9:.0f}",
        *(f"{fit.batch_tokens}{' R' * fit.recompute}" if fit else "no" for fit in fits),
        f"{stages.capture() / 1e9:.0f}",
        f"{stages.evaluation(1) / 1e9:.0f}",
        ", ".join(str(min(number, most)) if number else "no" for number in rows),
    ]
    return f"| {recipe} | {' | '.join(cells)} |"


def test_the_table_in_the_documentation_is_what_the_arithmetic_gives() -> None:
    text = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    recipes = [name for name in recipe_names() if not name.endswith("-demo")]
    assert [line for line in map(row, recipes) if line not in text] == []


if __name__ == "__main__":
    for name in recipe_names():
        if not name.endswith("-demo"):
            print(row(name))
