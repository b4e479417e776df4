"""The flows' command line: check the request, find a server, run the flow, show its outcome.

Prefect is imported late: its settings come from the environment, and a wrong recipe should not wait
for it.
"""

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import typer

from deepspec.artifacts.status import results
from deepspec.cli.options import RunName, Sets, Shards, StoreUrl
from deepspec.errors import EXIT_TRANSIENT, DeepSpecError, ShardsFailed, TransientError, UserError
from deepspec.process.launch import RunRequest
from deepspec.process.shard_ranges import parse_shards, shard_list
from flows.compatible import check_answer, check_server
from flows.flow_stages import STAGES_OF
from flows.request import checked_run
from flows.server import PrivateServer, start_private_server

WHOLE = ("train", "pipeline")  # flows of which no single shards can be chosen
END_S = 20.0  # for the last events and log lines
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run_command(only: str | None = None) -> None:
    """Run one flow by hand: `only` this one, or the one that the command line names.

    A user's mistake is one paragraph and an exit code, never a stack trace.
    """
    app = typer.Typer(
        no_args_is_help=only is None,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for flow_name in (only,) if only else STAGES_OF:
        summary = (
            f"Run the flow `{flow_name}`: whatever is missing in the store is made, "
            "nothing is made twice."
        )
        stages = ", ".join(STAGES_OF[flow_name])
        app.command(flow_name, help=summary, short_help=stages)(_command_of(flow_name))
    try:
        app(prog_name=f"python -m flows.{only}" if only else "python -m flows")
    except DeepSpecError as error:
        typer.echo(f"error: {error}", err=True)
        end_in_time(exit_code(error))
        sys.exit(exit_code(error))
    except SystemExit as leaving:
        end_in_time(leaving.code)
        raise


def _command_of(flow_name: str) -> Callable[..., None]:
    def command(
        run: RunName = "demo", *, sets: Sets, shards: Shards = None, store: StoreUrl = None
    ) -> None:
        run_flow(flow_name, RunRequest(run, tuple(sets), store), shards or "")

    return command


def end_in_time(code: object, seconds: float = END_S) -> None:
    """The process has ended by then, with this exit code: Prefect would wait minutes for each event
    that a hanging server does not accept.
    """
    sys.stdout.flush()
    timer = threading.Timer(seconds, os._exit, [code if isinstance(code, int) else bool(code)])
    timer.daemon = True
    timer.start()


def run_flow(flow_name: str, request: RunRequest, shards: str = "") -> None:
    """Run the flow, then print its tables and, as the last line, its summary as JSON.

    Raises:
        DeepSpecError: the request is wrong, there is no server, or the run failed.
    """
    started = time.monotonic()
    # In the form that the flow's own pattern accepts: `1,  2` and `17,` are no mistakes.
    shards = shard_list(parse_shards(shards))
    if shards and flow_name in WHOLE:
        raise UserError(
            f"the flow {flow_name!r} has no shards", where="--shards", fix="leave --shards out"
        )
    run = checked_run(request)
    server = start_private_server(run.store)
    from flows.display import show_summary, shown_on_terminal, summary_line

    # By its name: run as a script, that module imports this one.
    flows = importlib.import_module("flows.pipeline").FLOWS
    stages = [stage.name for stage in run.stages if stage.name in STAGES_OF[flow_name]]
    wait_for_server(server)
    with shown_on_terminal(stages), talking_to(server):
        chosen = {"shards": shards} if shards else {}
        outcomes = flows[flow_name](
            recipe=request.source, overrides=request.overrides, store=request.store or "", **chosen
        )
    last = outcomes[-1].status
    found = results(run) if last.stage == "evaluate" and last.sealed else None
    show_summary(outcomes, found)
    typer.echo(summary_line(outcomes, found, total_s=time.monotonic() - started))


def wait_for_server(server: PrivateServer | None) -> None:
    """Return when the private server, or the user's own, answers.

    Raises:
        UserError: it does not, or has another version.
    """
    if server is not None:
        server.wait()
        return
    check_answer(
        fix="start it (`prefect server start`), or unset PREFECT_API_URL to use a private one"
    )
    check_server()


@contextlib.contextmanager
def talking_to(server: PrivateServer | None) -> Iterator[None]:
    """Turns what Prefect raises into our errors. With a private server, runs send no heartbeats: no
    automation waits for them there, and each flow run waits a second for their thread at its end.
    """
    import httpx
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    try:
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None} if server else {}):
            yield
    except KeyboardInterrupt:
        typer.echo(
            "interrupted: every child has ended; the same command goes on where this one stopped",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    except (httpx.HTTPError, PrefectException) as error:
        raise TransientError(
            f"the Prefect server was lost: {type(error).__name__}: {error}",
            where="Prefect",
            fix="run the same command again: it goes on where this one stopped",
        ) from error


def exit_code(error: DeepSpecError) -> int:
    """The error's exit code; that of a transient error where another try may make every shard."""
    if isinstance(error, ShardsFailed):
        return EXIT_TRANSIENT if len(error.retryable) == len(error.failures) else error.exit_code
    return error.exit_code
