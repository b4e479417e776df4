"""The one door: `python -m deepspec <verb> RUN`. RUN is a recipe (`demo`) or a run file
(`my-run.yaml`).

Stage verbs do whatever is missing and nothing else, so running the same command again is how to
resume. With DEEPSPEC_EVENTS=1 a stage verb writes JSON events to stdout, one a line; that is how
the flows follow it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from deepspec.artifacts.run import Run as OpenedRun
from deepspec.artifacts.run import open_run
from deepspec.cli.inspection import Purpose, Run, RunOrArtifact, Sets, Shards, StoreUrl
from deepspec.cli.inspection import app as looking
from deepspec.config.recipes import recipe_names, to_yaml
from deepspec.errors import EXIT_FAILED, EXIT_TRANSIENT, ChildFailed, DeepSpecError, ShardsFailed
from deepspec.process.events import Report, json_lines
from deepspec.process.launch import RunRequest
from deepspec.process.shard_ranges import parse_shards
from deepspec.process.terminal import TerminalReport
from deepspec.train.launcher import ECHO_S, is_first_rank, is_rank, launch_ranks, num_ranks

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
    rich_markup_mode=None,
)
app.add_typer(looking)  # without a name of its own: its verbs stand beside these


@app.command()
def recipes() -> None:
    """List the recipes: an algorithm on a target."""
    for name in recipe_names():
        typer.echo(name)


@app.command("show-config")
def show_config(run: RunOrArtifact, sets: Sets = None, store: StoreUrl = None) -> None:
    """Print a run's whole configuration as YAML, ready to be saved, edited and run; of an
    artifact, the run that made it.
    """
    from deepspec.artifacts.provenance import drift, find_run

    config = find_run(run, sets or (), store=store)
    typer.echo(to_yaml(config), nl=False)
    if not sets and (what := drift(run, config)):
        typer.echo(f"warning: {what}", err=True)


@app.command()
def demo(run: Run = "demo", sets: Sets = None, store: StoreUrl = None) -> None:
    """Stage 0, demo recipes only: train the tiny target and write its prompts and benchmarks."""
    from deepspec.demo.stage import run_demo

    opened, report = _open(run, sets, store)
    run_demo(opened, report)


@app.command()
def prompts(run: Run, sets: Sets = None, store: StoreUrl = None) -> None:
    """Stage 1: read the source, drop what cannot be used, cut into shards."""
    from deepspec.prompts.stage import run_prompts

    opened, report = _open(run, sets, store)
    run_prompts(opened, report)


@app.command()
def answers(run: Run, sets: Sets = None, store: StoreUrl = None, shards: Shards = None) -> None:
    """Stage 2: the target answers every prompt anew."""
    from deepspec.answers.stage import run_answers

    opened, report = _open(run, sets, store)
    run_answers(opened, shards=_chosen(shards), report=report)


@app.command()
def hidden(
    run: Run,
    sets: Sets = None,
    store: StoreUrl = None,
    shards: Shards = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="begin even where the store cannot hold all of it")
    ] = False,
    purpose: Annotated[
        Purpose,
        typer.Option(
            "--for", help="rolling: to be used up, never sealed; index: which samples, no state"
        ),
    ] = "cache",
) -> None:
    """Stage 3: capture the target's hidden states over prompts and answers."""
    from deepspec.hidden.stage import run_capture
    from deepspec.plan.plan import check_cache_fits

    opened, report = _open(
        run, [*(sets or ()), *(["resources.checks.space=warn"] if force else [])], store
    )
    if purpose == "cache":
        check_cache_fits(opened)
    run_capture(opened, shards=_chosen(shards), purpose=purpose, report=report)


@app.command()
def train(run: Run, sets: Sets = None, store: StoreUrl = None) -> None:
    """Stage 4: train the draft on every visible GPU, from the newest checkpoint if there is one."""
    opened, report = _open(run, sets, store)
    ranks = 1 if is_rank() else num_ranks(opened)
    if ranks > 1:
        launch_ranks(
            RunRequest(run, tuple(sets or ()), store),
            ranks,
            report=report,
            stop_s=opened.config.resources.runner.stop_s,
        )
        return
    from deepspec.train.loop import run_train

    run_train(opened, report)


@app.command()
def benchmarks(run: Run, sets: Sets = None, store: StoreUrl = None) -> None:
    """Read the run's known benchmarks into the store now, so that its other stages need no
    network for them.
    """
    from deepspec.prompts.benchmarks import benchmark_digests

    opened, _ = _open(run, sets, store)
    for name in {**benchmark_digests(opened, "prompts"), **benchmark_digests(opened, "evaluate")}:
        typer.echo(f"{name} is in the store")


@app.command()
def evaluate(run: Run, sets: Sets = None, store: StoreUrl = None, shards: Shards = None) -> None:
    """Stage 5: decode the benchmarks plainly and speculatively, side by side."""
    from deepspec.artifacts.status import results
    from deepspec.evaluate.stage import run_evaluate
    from deepspec.report.report import put_report

    opened, report = _open(run, sets, store)
    artifact = run_evaluate(opened, shards=_chosen(shards), report=report)
    if artifact.manifest() is not None:
        put_report([artifact], ["html", "markdown"])  # the page for people, the text for the flows
        report({"event": "result", "stage": "evaluate", **results(opened).to_json()})


@app.command()
def export(
    draft: Annotated[
        str,
        typer.Argument(
            metavar="DRAFT", help="a draft's folder, or the train artifact that holds it"
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write, new or empty")],
    to: Annotated[
        str, typer.Option("--to", metavar="ENGINE", help="vllm, sglang, speculators or hf")
    ],
) -> None:
    """Write a draft as a serving engine expects it; it counts once it was read back and drafts
    as the original.
    """
    from deepspec.export.export import export_draft

    export_draft(Path(draft), engine=to, out=Path(out))
    typer.echo(f"{out} holds the draft for {to}, and drafts as the original does")


@app.command()
def conformance(
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="a target's folder: is everything that a draft needs true of it?"
        ),
    ],
) -> None:
    """Check a target and a draft of each algorithm on it; exit 1 where any quantity is outside
    what is allowed.
    """
    from deepspec.evaluate.conformance import run_target_checks
    from deepspec.target.conformance import print_checks

    if not print_checks(run_target_checks(Path(model)), subject="part"):
        raise typer.Exit(EXIT_FAILED)


def _open(run: str, sets: list[str] | None, store: str | None) -> tuple[OpenedRun, Report]:
    """The opened run, and where its events go.

    A store that cannot be used is refused before anything is loaded.
    """
    opened = open_run(run, sets or (), store=store)
    opened.store.check_writable(opened.config.resources.storage.min_free_gb)
    return opened, json_lines if _speaks_json() else TerminalReport().show


def _chosen(shards: str | None) -> list[int] | None:
    return None if shards is None else parse_shards(shards)


def _speaks_json() -> bool:
    return os.environ.get("DEEPSPEC_EVENTS") == "1"


def main(run_app: Callable[[], Any] = app) -> None:
    """Run a verb; an error is one paragraph (and one JSON line for a parent process) and an
    exit code, never a stack trace.
    """
    # OpenMP's threads spin while they wait; beside other busy processes that made a training step
    # over ten times slower. A short spin costs nothing on a quiet machine. It is read when PyTorch
    # is loaded, which no verb has done yet.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    level = os.environ.get("DEEPSPEC_LOG", "INFO" if is_first_rank() else "WARNING")
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if is_rank() and len(sys.argv) > 1 and sys.argv[1].startswith("--local_rank="):
        del sys.argv[1]  # DeepSpeed's launcher says it before the verb; it is in LOCAL_RANK, too
    try:
        run_app()
    except DeepSpecError as error:
        transient = error.transient or (isinstance(error, ShardsFailed) and bool(error.retryable))
        if _speaks_json():
            json_lines({"event": "error", **error.to_json(), "transient": transient})
        else:
            typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_TRANSIENT if transient else error.exit_code)
    except Exception as error:
        if not (is_rank() and _speaks_json()):
            raise
        # a lost connection is the echo of another rank's end: then torchrun ends this one before it
        # speaks
        time.sleep(ECHO_S)
        logging.exception("this rank failed")
        json_lines(
            {
                "event": "error",
                **ChildFailed(f"{type(error).__name__}: {error}").to_json(),
                "transient": False,
            }
        )
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
