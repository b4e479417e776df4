"""`python -m tests.vectors DIR` recomputes every reference case of a folder; exit 1 where any
quantity is outside.
"""

from pathlib import Path

import typer

from deepspec.__main__ import main
from deepspec.errors import EXIT_FAILED
from deepspec.target.conformance import print_checks
from tests.vectors.run import run_vectors

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def vectors(folder: str) -> None:
    """Compare this code with the reference vectors in FOLDER."""
    if not print_checks(run_vectors(Path(folder)), subject="case"):
        raise typer.Exit(EXIT_FAILED)


if __name__ == "__main__":
    main(app)
