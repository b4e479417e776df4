"""`python -m flows.setup`: everything that a Prefect server needs to run the flows. Run it again
after every change.

Work pools with their templates, the deployments of prefect.yaml, an automation that marks runs as
crashed which died silently, one per pool for runs that no worker takes, and on request one that
calls a webhook at the end of runs. What exists already is brought up to date.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deepspec import __version__
from deepspec.errors import DeepSpecError, UserError
from flows.automations import SILENCE_S, SILENT_HEARTBEATS, crashed, ended, unattended
from flows.cli import talking_to
from flows.compatible import check_answer, check_version

POOLS = ("deepspec-cpu", "deepspec-gpu")

NotifyUrl = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="URL",
        envvar="DEEPSPEC_NOTIFY_URL",
        help="webhook that is called when a run finished, failed or crashed",
    ),
]
Silence = Annotated[
    float,
    typer.Option(
        "--silence",
        metavar="SECONDS",
        help="a run that shows no sign of life for so long is marked crashed",
    ),
]
CpuRuns = Annotated[
    int | None,
    typer.Option(
        "--cpu-runs",
        min=1,
        metavar="N",
        help="runs at a time on deepspec-cpu, all workers together",
    ),
]
GpuRuns = Annotated[
    int | None,
    typer.Option(
        "--gpu-runs",
        min=1,
        metavar="N",
        help="runs at a time on deepspec-gpu, all workers together",
    ),
]


def command(
    notify: NotifyUrl = None,
    silence_s: Silence = SILENCE_S,
    cpu_runs: CpuRuns = None,
    gpu_runs: GpuRuns = None,
) -> None:
    """Set a Prefect server up for the flows; as often as you like, from the repository's folder."""
    with talking_to(None):
        setup(
            notify=notify,
            silence_s=silence_s,
            limits=dict(zip(POOLS, (cpu_runs, gpu_runs), strict=True)),
        )


def setup(*, notify: str | None, silence_s: float, limits: dict[str, int | None]) -> None:
    """Pools, deployments and automations are on the server as described here; a line is printed for
    each.

    Raises:
        UserError: no server, or one of another version; not the repository's folder; an interval
            that would end healthy runs.
    """
    from prefect.client.orchestration import get_client

    check_folder(Path.cwd())
    check_silence(silence_s)
    require_server()
    with get_client(sync_client=True) as client:
        check_version(client.api_version())
        for pool in POOLS:
            typer.echo(put_pool(client, pool, limits[pool]))
        typer.echo(deploy(str(client.api_url)))
        typer.echo(put_automation(client, crashed(silence_s)))
        for pool in POOLS:
            typer.echo(put_automation(client, unattended(pool)))
        if notify:
            typer.echo(put_automation(client, ended(notify)))
        for pool in POOLS:
            workers = client.read_workers_for_work_pool(pool)
            if not any(worker.status == "ONLINE" for worker in workers):
                typer.echo(
                    f"no worker on the work pool {pool!r} yet: "
                    f"start one with `prefect worker start --pool {pool}`"
                )


def check_folder(folder: Path) -> None:
    """Return where the folder has the files that are installed.

    Raises:
        UserError: names those that are missing.
    """
    needed = ["prefect.yaml", *(f"deployments/work_pools/{pool}.json" for pool in POOLS)]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(
            f"{' and '.join(missing)} not found",
            where=str(folder),
            fix="run this from the repository's folder",
        )


def check_silence(silence_s: float) -> None:
    """Refuse an interval in which a healthy run may be silent: it sends a heartbeat now and
    then, and one may get lost.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY

    heartbeat_s = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() or SILENCE_S / SILENT_HEARTBEATS
    least_s = SILENT_HEARTBEATS * heartbeat_s
    if silence_s < least_s:
        raise UserError(
            f"after {silence_s:g} s of silence healthy runs would be marked crashed: "
            f"at least {least_s:g} s are needed",
            where="--silence",
            fix="leave --silence out, or set PREFECT_FLOWS_HEARTBEAT_FREQUENCY to a third of it "
            "here and wherever flows run (least: 30)",
        )


def require_server() -> None:
    """Return when the user's server answers.

    Raises:
        UserError: none is set, or it does not answer.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url is None:
        raise UserError(
            "no Prefect server is set",
            where="PREFECT_API_URL",
            fix="`prefect server start` in another terminal, "
            "then here `export PREFECT_API_URL=http://127.0.0.1:4200/api`",
        )
    check_answer(fix="start it (`prefect server start`), or correct PREFECT_API_URL")


def put_pool(client: Any, name: str, limit: int | None) -> str:
    """The pool has this repository's template; a limit that is not given stays as it is.

    Returns what was done, in a line.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = json.loads(
        Path("deployments", "work_pools", f"{name}.json").read_text(encoding="utf-8")
    )
    limited = {} if limit is None else {"concurrency_limit": limit}
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=name, type="process", base_job_template=template, **limited)
        )
        return f"work pool {name}: made"
    # The site has its own, such as one of Kubernetes, whose template is for another kind of worker.
    if found.type != "process":
        return f"work pool {name}: is of type {found.type!r}, left as it is"
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, **limited))
    return f"work pool {name}: up to date"


def deploy(api_url: str) -> str:
    """Every deployment of prefect.yaml in this folder is made, by the command that a user would
    type.

    Raises:
        UserError: Prefect refuses one.
    """
    line = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # What prefect.yaml takes from its environment: the runs' folder and the package's version.
    env = {
        **os.environ,
        "PREFECT_API_URL": api_url,
        "PWD": str(Path.cwd()),
        "DEEPSPEC_VERSION": __version__,
    }
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        output = "\n    ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise UserError(
            f"the deployments were not made:\n    {output}",
            where="prefect.yaml",
            fix="run `prefect --no-prompt deploy --all`",
        )
    return f"deployments of {Path.cwd() / 'prefect.yaml'}: up to date"


def put_automation(client: Any, automation: Any) -> str:
    """The server has one automation of its name: this one."""
    found = client.read_automations_by_name(automation.name)
    for extra in found[1:]:
        client.delete_automation(extra.id)
    if found:
        client.update_automation(found[0].id, automation)
    else:
        client.create_automation(automation)
    return f"automation {automation.name!r}: {'up to date' if found else 'made'}"


def run_setup() -> None:
    """The command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    try:
        app(prog_name="python -m flows.setup")
    except DeepSpecError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run_setup()
