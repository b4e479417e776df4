"""The verbs that look at runs and their store rather than add to it, and remove what is damaged or
left over.
"""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deepspec.artifacts.run import open_run
from deepspec.artifacts.status import StageStatus, stage_status
from deepspec.cli.options import AsJson, RunName, RunOrArtifact, Sets, StoreUrl
from deepspec.config.recipes import recipe_names, to_yaml
from deepspec.errors import EXIT_FAILED

app = typer.Typer()


@app.command()
def recipes() -> None:
    """List the recipes: an algorithm on a target."""
    typer.echo("\n".join(recipe_names()))


@app.command("show-config")
def show_config(run: RunOrArtifact, sets: Sets, store: StoreUrl = None) -> None:
    """Print a run's whole configuration as YAML.

    It can be saved, edited and run. For an artifact it is the run that made it.
    """
    from deepspec.artifacts.lineage import drift, find_run

    config = find_run(run, sets, store=store)
    typer.echo(to_yaml(config), nl=False)
    if not sets and (what := drift(run, config)):
        typer.echo(f"warning: {what}", err=True)


@app.command()
def devices(run: RunName, sets: Sets, store: StoreUrl = None) -> None:
    """Show what the run would compute on here.

    A GPU that cannot be used is an error; so is one that is too old for the run's number formats.
    """
    from deepspec.target.device import describe_device

    config = open_run(run, sets, store=store).config
    dtypes = {config.target.dtype, config.train.compute_dtype}
    dtypes.add(config.evaluate.dtype or config.target.dtype)
    for line in describe_device(config.resources.devices.type, dtypes=dtypes):
        typer.echo(line)


@app.command()
def status(run: RunName, sets: Sets, store: StoreUrl = None) -> None:
    """Show what each stage has, lacks, rejected or failed at."""
    opened = open_run(run, sets, store=store)
    titles = "stage,state,shards,missing,rows,rejected,tokens,truncated,MB"
    table = Table(*titles.split(","), box=None)
    found = [stage_status(opened, stage.name) for stage in opened.stages]
    for part in found:
        truncated = "" if part.truncated_share is None else f"{part.truncated_share:.1%}"
        counts = (part.committed, len(part.missing), part.rows, part.rejected_rows, part.tokens)
        size = f"{part.num_bytes / 1e6:.1f}"
        table.add_row(part.stage, _state(part), *map(str, counts), truncated, size)
    Console().print(table)
    for part in found:
        typer.echo(f"{part.stage:9} {part.artifact_url}")
        for shard, reason in part.failures.items():
            typer.echo(f"{'':9} shard {shard} failed: {reason}")


def _state(part: StageStatus) -> str:
    if part.sealed:
        return "sealed"
    if part.in_training:
        return "in training"
    if part.failures:
        return "failed"
    return "part done" if part.committed else "to do"


@app.command()
def plan(  # noqa: PLR0913 - a command's options are independent of each other
    run: RunName,
    sets: Sets,
    store: StoreUrl = None,
    *,
    sample: Annotated[
        int, typer.Option(metavar="N", min=1, help="prompts to read and tokenize")
    ] = 256,
    train_hours: Annotated[
        float | None,
        typer.Option(metavar="H", min=0.001, help="hours that training takes, if you know"),
    ] = None,
    gpu: Annotated[
        float | None,
        typer.Option(
            metavar="GB", min=0.001, help="memory of the GPU to plan for, such as 24 or 80"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="exit with 0 even where it does not fit")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run takes, and whether it fits.

    Tokens, bytes, requests, hours, bandwidth and memory of a GPU are known before anything is
    started.
    """
    from deepspec.plan.plan import plan_run, require_plan_fits
    from deepspec.plan.view import print_plan

    opened = open_run(run, sets, store=store)
    found = plan_run(opened, num_rows=sample, train_hours=train_hours, gpu_gb=gpu)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        print_plan(found, is_terminal=sys.stdout.isatty())
    if not force:
        require_plan_fits(found)


@app.command()
def show(
    run: RunName,
    sets: Sets,
    store: StoreUrl = None,
    *,
    shard: Annotated[int, typer.Option(metavar="N", min=0, help="shard of the answers")] = 0,
    row: Annotated[int, typer.Option(metavar="N", min=0, help="row in that shard, from 0")] = 0,
) -> None:
    """Print a training sample, supervised tokens in green.

    Where the output is no terminal they are between marks.
    """
    from deepspec.hidden.show import show_sample

    console, opened = Console(highlight=False), open_run(run, sets, store=store)
    for text in show_sample(opened, shard=shard, row=row, colours=console.is_terminal):
        console.print(text, soft_wrap=True)


@app.command("verify")
def verify_run(run: RunName, sets: Sets, store: StoreUrl = None) -> None:
    """Compare everything committed with its checksum.

    What is damaged is named and made missing, so that the stage makes it again.
    """
    from deepspec.artifacts.verify import verify_all
    from deepspec.cache.damage import locate_damage

    damaged = False
    for problem in verify_all(open_run(run, sets, store=store), {"hidden": locate_damage}):
        # at once: its record is gone by now, and the rest may take hours
        typer.echo(problem, err=True)
        damaged = True
    if damaged:
        raise typer.Exit(EXIT_FAILED)
    typer.echo("every committed byte is as it was written")


@app.command()
def gc(
    run: RunName,
    sets: Sets,
    store: StoreUrl = None,
    *,
    grace_hours: Annotated[
        float, typer.Option(metavar="H", min=0, help="leave alone what is younger")
    ] = 24.0,
    remove: Annotated[
        bool, typer.Option("--remove", help="remove it; without this it is only listed")
    ] = False,
) -> None:
    """Find leftovers of killed or racing workers.

    Unnamed files, unfinished uploads and quarantined shards in the run's store.
    """
    from deepspec.artifacts import gc as collector
    from deepspec.formatting import human_bytes

    place = open_run(run, sets, store=store).store
    place.check_writable()
    found = collector.orphans(place, grace_s=3600 * grace_hours)
    for orphan in found:
        size, hours = human_bytes(orphan.num_bytes), orphan.age_s / 3600
        typer.echo(f"{orphan.kind:10} {size:>8}  {hours:7.1f} h  {orphan.path}")
    if remove:
        size = human_bytes(collector.remove(place, found))
        typer.echo(f"{size} are free again; what is in use by now was kept")
    else:
        typer.echo(
            f"{len(found)} found; `--remove` removes them" if found else "nothing is left over"
        )


@app.command()
def lineage(run: RunOrArtifact, sets: Sets, store: StoreUrl = None) -> None:
    """Print what an artifact was made from.

    The whole chain back to its prompts, read from the store alone.
    """
    from deepspec.artifacts.lineage import find_artifact, lineage_lines

    for line in lineage_lines(find_artifact(run, sets, store=store)):
        typer.echo(line)
