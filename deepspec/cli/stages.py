"""The stage verbs: each does what is missing of its stage, and reports while it works."""

from typing import Annotated

import typer

from deepspec.artifacts.run import Run, open_run
from deepspec.cli.options import Purpose, RunName, Sets, Shards, StoreUrl, moved
from deepspec.process.events import Report, json_lines, reports_to_parent
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import TerminalReport
from deepspec.process.shard_ranges import parse_shards
from deepspec.train.launcher import is_rank, launch_ranks, num_ranks

app = typer.Typer()


@app.command()
def demo(run: RunName = "demo", *, sets: Sets, store: StoreUrl = None) -> None:
    """Stage 0, demo only: train the tiny target.

    Its prompts and benchmarks are written with it.
    """
    from deepspec.demo.stage import run_demo

    run_demo(*_open(run, sets, store))


@app.command()
def prompts(run: RunName, sets: Sets, store: StoreUrl = None) -> None:
    """Stage 1: read the source and cut it into shards.

    Rows that cannot be used go to the rejects.
    """
    from deepspec.prompts.stage import run_prompts

    run_prompts(*_open(run, sets, store))


@app.command()
def answers(run: RunName, sets: Sets, store: StoreUrl = None, shards: Shards = None) -> None:
    """Stage 2: the target answers every prompt anew."""
    from deepspec.answers.stage import run_answers

    opened, report = _open(run, sets, store)
    run_answers(opened, shards=_numbers(shards), report=report)


@app.command()
def hidden(  # noqa: PLR0913 - a command's options are independent of each other
    run: RunName,
    sets: Sets,
    store: StoreUrl = None,
    shards: Shards = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="begin even where the store cannot hold all of it")
    ] = False,
    purpose: Annotated[
        Purpose,
        typer.Option(
            help="cache: to be kept; rolling: to be used up, never sealed; index: only which "
            "samples there will be, no state"
        ),
    ] = "cache",
    old_purpose: Annotated[str | None, moved("--for", "--purpose {}")] = None,
) -> None:
    """Stage 3: capture the target's hidden states.

    Every sample of prompts and answers goes through the target once.
    """
    from deepspec.hidden.stage import run_capture
    from deepspec.plan.plan import check_cache_fits

    forced = ["resources.checks.space=warn"] if force else []
    opened, report = _open(run, [*sets, *forced], store)
    if purpose == "cache":
        check_cache_fits(opened)
    run_capture(opened, shards=_numbers(shards), purpose=purpose, report=report)


@app.command()
def train(run: RunName, sets: Sets, store: StoreUrl = None) -> None:
    """Stage 4: train the draft.

    It runs on every visible GPU, and resumes from the newest checkpoint if there is one.
    """
    opened, report = _open(run, sets, store)
    ranks = 1 if is_rank() else num_ranks(opened)
    if ranks > 1:
        request = RunRequest(run, tuple(sets), store)
        patience_s = opened.config.resources.runner.patience_s
        launch_ranks(request, ranks, report=report, stop_s=patience_s)
        return
    from deepspec.train.loop import run_train

    run_train(opened, report)


@app.command()
def benchmarks(run: RunName, sets: Sets, store: StoreUrl = None) -> None:
    """Read the run's known benchmarks into the store.

    No stage needs a network for them afterwards.
    """
    from deepspec.prompts.benchmarks import benchmark_digests

    opened, _ = _open(run, sets, store)
    for name in {**benchmark_digests(opened, "prompts"), **benchmark_digests(opened, "evaluate")}:
        typer.echo(f"{name} is in the store")


@app.command()
def evaluate(run: RunName, sets: Sets, store: StoreUrl = None, shards: Shards = None) -> None:
    """Stage 5: decode the benchmarks with and without draft.

    Every prompt is decoded plainly and speculatively, and counted.
    """
    from deepspec.artifacts.status import results
    from deepspec.evaluate.stage import run_evaluate
    from deepspec.report.report import put_report

    opened, report = _open(run, sets, store)
    artifact = run_evaluate(opened, shards=_numbers(shards), report=report)
    if artifact.manifest() is not None:
        put_report([artifact], ["html", "markdown"])  # the page for people, the text for the flows
        report({"event": "result", "stage": "evaluate", **results(opened).to_json()})


def _open(run: str, sets: list[str], store: str | None) -> tuple[Run, Report]:
    """The run, and where its events go; a store that cannot be used is refused before any load."""
    opened = open_run(run, sets, store=store)
    opened.store.check_writable(opened.config.resources.storage.min_free_gb)
    return opened, json_lines if reports_to_parent() else TerminalReport().show


def _numbers(shards: str | None) -> list[int] | None:
    return None if shards is None else parse_shards(shards)
