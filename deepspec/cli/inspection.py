"""The verbs that look at what is there, or will be, rather than add to it: status, plan, show,
verify, gc, lineage, compare, report.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from deepspec.artifacts.run import open_run
from deepspec.errors import EXIT_FAILED

app = typer.Typer()

Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a recipe (see `recipes`) or a run file ending in .yaml"),
]
RunOrArtifact = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a run (recipe or .yaml), or an artifact's folder or URL"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one field, e.g. --set train.lr=3e-4"),
]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="artifact store: a folder or s3://bucket/prefix"),
]
Shards = Annotated[
    str | None,
    typer.Option(
        "--shards", metavar="LIST", help="only these of the missing shards, e.g. 17,18,40-52"
    ),
]

Purpose = Literal["cache", "rolling", "index"]


@app.command()
def status(run: Run, sets: Sets = None, store: StoreUrl = None) -> None:
    """Show per stage what is committed, missing, rejected or failed."""
    from deepspec.artifacts.status import stage_status

    opened = open_run(run, sets or (), store=store)
    table = Table(
        "stage",
        "state",
        "shards",
        "missing",
        "rows",
        "rejected",
        "tokens",
        "truncated",
        "MB",
        box=None,
    )
    found = [stage_status(opened, stage.name) for stage in opened.stages]
    for part in found:
        state = (
            "sealed"
            if part.sealed
            else "in training"
            if part.in_training
            else "failed"
            if part.failures
            else "to do"
            if not part.committed
            else "part done"
        )
        truncated = "" if part.truncated_share is None else f"{part.truncated_share:.1%}"
        cells = (
            part.committed,
            len(part.missing),
            part.rows,
            part.rejected_rows,
            part.tokens,
            truncated,
            f"{part.num_bytes / 1e6:.1f}",
        )
        table.add_row(part.stage, state, *map(str, cells))
    Console().print(table)
    for part in found:
        typer.echo(f"{part.stage:9} {part.artifact_url}")
        for shard, reason in part.failures.items():
            typer.echo(f"{'':9} shard {shard} failed: {reason}")


@app.command()
def plan(  # noqa: PLR0913 - a command line's options are independent of each other, and each has a default
    run: Run,
    sets: Sets = None,
    store: StoreUrl = None,
    *,
    sample: Annotated[
        int, typer.Option(metavar="N", min=1, help="prompts to read and tokenize")
    ] = 256,
    train_hours: Annotated[
        float | None,
        typer.Option(metavar="H", min=0.001, help="hours that training takes, if you know"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="exit with 0 even where it does not fit")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object instead of the table")
    ] = False,
) -> None:
    """Tell what a run will take (tokens, bytes, requests, hours, bandwidth) before it starts,
    and whether it fits.
    """
    from deepspec.plan.plan import plan_run, require_plan_fits
    from deepspec.plan.view import show

    found = plan_run(
        open_run(run, sets or (), store=store), num_rows=sample, train_hours=train_hours
    )
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        show(found, is_terminal=sys.stdout.isatty())
    if not force:
        require_plan_fits(found)


@app.command()
def show(
    run: Run,
    sets: Sets = None,
    store: StoreUrl = None,
    *,
    shard: Annotated[int, typer.Option(metavar="N", min=0, help="shard of the answers")] = 0,
    row: Annotated[int, typer.Option(metavar="N", min=0, help="row in that shard, from 0")] = 0,
) -> None:
    """Print a training sample with its supervised tokens in green (between marks where that is
    no terminal).
    """
    from deepspec.hidden.show import show_sample

    console = Console(highlight=False)
    for text in show_sample(
        open_run(run, sets or (), store=store), shard=shard, row=row, colours=console.is_terminal
    ):
        console.print(text, soft_wrap=True)


@app.command()
def verify(run: Run, sets: Sets = None, store: StoreUrl = None) -> None:
    """Read everything that is committed and compare it with its checksum; what is damaged is
    named and made missing.
    """
    from deepspec.artifacts.verify import verify_benchmarks, verify_stage
    from deepspec.cache.damage import locate_damage

    opened, locate = open_run(run, sets or (), store=store), {"hidden": locate_damage}
    damaged = 0
    checks = [
        *(verify_stage(opened, stage.name, locate.get(stage.name)) for stage in opened.stages),
        verify_benchmarks(opened),
    ]
    for problem in (line for check in checks for line in check):
        # at once: its record is gone by now, and the rest may take hours
        typer.echo(problem, err=True)
        damaged += 1
    if damaged:
        raise typer.Exit(EXIT_FAILED)
    typer.echo("every committed byte is as it was written")


@app.command()
def gc(
    run: Run,
    sets: Sets = None,
    store: StoreUrl = None,
    *,
    grace_hours: Annotated[
        float, typer.Option(metavar="H", min=0, help="leave alone what is younger")
    ] = 24.0,
    remove: Annotated[
        bool, typer.Option("--remove", help="take it away; without this it is only listed")
    ] = False,
) -> None:
    """Find what killed or racing workers left in the run's store: unnamed files, unfinished
    uploads, quarantined shards.
    """
    from deepspec.artifacts import gc as collector
    from deepspec.formatting import human_bytes

    place = open_run(run, sets or (), store=store).store
    place.check_writable()
    found = collector.orphans(place, grace_s=3600 * grace_hours)
    for orphan in found:
        typer.echo(
            f"{orphan.kind:10} {human_bytes(orphan.num_bytes):>8}  {orphan.age_s / 3600:7.1f} h  {orphan.path}"
        )
    if remove:
        typer.echo(
            f"{human_bytes(collector.remove(place, found))} are free again; what is in use by now was kept"
        )
    else:
        typer.echo(
            f"{len(found)} found; `--remove` takes them away"
            if found
            else "nothing was left behind"
        )


@app.command()
def lineage(
    folder: Annotated[
        str, typer.Argument(help="an artifact's folder (result, draft, ...) or a run")
    ],
    sets: Sets = None,
    store: StoreUrl = None,
) -> None:
    """Tell what an artifact was made from, back to its prompts, from the store alone."""
    from deepspec.artifacts.lineage import describe

    for line in describe(folder, sets or (), store=store):
        typer.echo(line)


ResultName = Annotated[
    str, typer.Argument(metavar="RUN", help="a run (recipe or .yaml), or a result's folder or URL")
]


@app.command()
def compare(
    a: ResultName,
    b: ResultName,
    sets: Sets = None,
    store: StoreUrl = None,
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object instead of the tables")
    ] = False,
) -> None:
    """Tell how much better the second result is than the first on the prompts that both have,
    and how sure that is.
    """
    from deepspec.report.comparison import compare_results, comparison_tables

    found = compare_results(a, b, sets or (), store=store)
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
    sets: Sets = None,
    store: StoreUrl = None,
    *,
    form: Annotated[
        Literal["html", "markdown"],
        typer.Option("--format", help="a page, or text for the terminal"),
    ] = "html",
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="PATH", help="a local file, instead of beside the result"),
    ] = None,
) -> None:
    """Show results side by side: acceptance, speed, calibration, scheduler, where they come
    from, every setting.
    """
    from deepspec.report import report as reports

    artifacts = reports.open_results(results, sets or (), store=store)
    if output is not None:
        typer.echo(reports.save_report(artifacts, form, output))
    elif form == "html":
        typer.echo("\n".join(reports.put_report(artifacts)))
    else:
        typer.echo(reports.report_text(artifacts, form), nl=False)
