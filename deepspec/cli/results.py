"""The verbs about what came out: drafts for serving engines, conformance, results compared and
shown.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from deepspec.cli.options import AsJson, RunOrArtifact, Sets, StoreUrl, moved
from deepspec.errors import EXIT_FAILED

app = typer.Typer()


@app.command()
def export(
    draft: Annotated[
        str,
        typer.Argument(
            metavar="DRAFT",
            help="a draft's folder, or the folder or URL of the train artifact that holds it",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write, new or empty")],
    to: Annotated[
        str, typer.Option("--to", metavar="ENGINE", help="vllm, sglang, speculators or hf")
    ],
) -> None:
    """Write a draft as a serving engine expects it.

    It is read back, and must draft as the original does.
    """
    from deepspec.export.export import export_draft

    export_draft(draft, engine=to, out=Path(out))
    typer.echo(f"{out} holds the draft for {to}, and drafts as the original does")


@app.command()
def conformance(
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="a target's folder: is everything that a draft needs true of it?"
        ),
    ],
    vectors: Annotated[
        str | None, moved("--vectors", "the command `python -m tests.vectors {}`")
    ] = None,
) -> None:
    """Check a target, and a draft of each algorithm on it.

    Exit code 1 where any quantity is outside its tolerance.
    """
    from deepspec.evaluate.conformance import run_target_checks
    from deepspec.target.conformance import print_checks

    if not print_checks(run_target_checks(Path(model)), subject="part"):
        raise typer.Exit(EXIT_FAILED)


@app.command("compare")
def compare_two(
    a: RunOrArtifact,
    b: RunOrArtifact,
    sets: Sets,
    store: StoreUrl = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Compare two results, the second with the first.

    By how much on the prompts that both have, and how sure that is.
    """
    from deepspec.report.comparison import compare_results, comparison_tables

    found = compare_results(a, b, sets, store=store)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in comparison_tables(found):
        console.print(table, markup=False)  # a path may hold [brackets]


@app.command()
def report(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="runs (recipes or .yaml), or results' folders or URLs"
        ),
    ],
    sets: Sets,
    store: StoreUrl = None,
    *,
    form: Annotated[
        Literal["html", "markdown"],
        typer.Option("--format", help="a page, or text for the terminal"),
    ] = "html",
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="PATH", help="a local file, instead of in the artifact"),
    ] = None,
) -> None:
    """Show results side by side.

    The report has acceptance, speed, calibration, scheduler, lineage and every setting.
    """
    from deepspec.report import report as reports

    artifacts = reports.open_results(results, sets, store=store)
    if output is not None:
        typer.echo(reports.save_report(artifacts, form, output))
    elif form == "html":
        typer.echo("\n".join(reports.put_report(artifacts)))
    else:
        typer.echo(reports.report_text(artifacts, form), nl=False)
