"""A failed run's artifact: which shards are missing and why, and the commands that go on from
there, ready to be copied.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from deepspec.artifacts.stages import STAGES
from deepspec.errors import DeepSpecError, ShardsFailed, UserError
from deepspec.process.launch import RunRequest
from deepspec.process.shard_ranges import shard_list
from flows.reporting import best_effort, prefect_key

MOST_ROWS = 200  # of the table; a command names every shard
LONGEST_REASON = 500  # characters


class Origin(NamedTuple):
    """The run that a user started, of which the failed one may be a part."""

    flow: str
    deployment: str | None
    """Its deployment's name, `demo` of `regenerate/demo`; None where it was started by hand."""
    parameters: Mapping[str, Any]


def publish_failure(run_name: str, error: DeepSpecError, request: RunRequest, stage: str) -> None:
    """The run has an artifact with why it failed and how to go on."""
    with best_effort():
        create_markdown_artifact(
            failure_text(run_name, error, resume_commands(request, stage, error)),
            key=prefect_key(f"{run_name}-failure"),
            description=f"{stage} failed, and how to go on",
        )


def failure_text(run_name: str, error: DeepSpecError, commands: Mapping[str, str]) -> str:
    """The error as Markdown: a table of the shards that are missing, the rest of the error, and a
    block for each command.
    """
    parts = [f"## {run_name} failed"]
    if error.failures:
        lines = ["| shard | why it is missing | may another try help? |", "| ---: | --- | --- |"]
        for shard, failure in sorted(error.failures.items())[:MOST_ROWS]:
            may_help = "yes" if failure.get("transient") else "no, not as it is"
            lines.append(f"| {shard} | {_cell(failure['what'])} | {may_help} |")
        parts.append("\n".join(lines))
        if (more := len(error.failures) - MOST_ROWS) > 0:
            parts.append(f"and {more:,} more shards.")
    if not isinstance(error, ShardsFailed):  # its text only repeats the table
        parts.append(_block(str(error)))
    parts += [f"### {title}\n\n{_block(command)}" for title, command in commands.items()]
    return "\n\n".join(parts) + "\n"


def resume_commands(request: RunRequest, stage: str, error: DeepSpecError) -> dict[str, str]:
    """By what they do: commands for the missing shards alone, and for the whole run again, as the
    run itself was started.
    """
    missing = sorted(error.failures) if STAGES[stage].is_selectable else []
    commands = dict[str, str]()
    with get_client(sync_client=True) as client:
        origin = find_origin(client)
        deployment = f"{STAGES[stage].flow}/{origin.deployment}"
        if missing and origin.deployment and _has_deployment(client, deployment):
            parameters = {**_parameters(request), "shards": shard_list(missing)}
            command = deployment_command(deployment, parameters)
            commands["Only these shards, by a worker"] = command
    if missing:
        commands["Only these shards, on this machine"] = request.shown(stage, missing)
    corrected = "Once that is corrected, the" if isinstance(error, UserError) else "The"
    again = f"{corrected} same run again: it does only what is missing"
    if origin.deployment:
        deployment = f"{origin.flow}/{origin.deployment}"
        commands[again] = deployment_command(deployment, origin.parameters)
    else:
        words = ["python", "-m", "flows", origin.flow, *request.arguments()]
        chosen = origin.parameters.get("shards")
        if chosen not in (None, ""):
            words += ["--shards", str(chosen)]
        commands[again] = shlex.join(words)
    return commands


def find_origin(client: SyncPrefectClient) -> Origin:
    """The outermost run around this one, as the server knows it."""
    run = client.read_flow_run(flow_run.root_flow_run_id)
    flow_name = client.read_flow(run.flow_id).name
    deployment = client.read_deployment(run.deployment_id).name if run.deployment_id else None
    return Origin(flow_name, deployment, run.parameters)


def deployment_command(name: str, parameters: Mapping[str, Any]) -> str:
    """`prefect deployment run NAME -p ...` for a shell, without parameters that are empty."""
    words = ["prefect", "deployment", "run", name]
    for key, value in parameters.items():
        if value in ("", None, [], ()):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        words += ["-p", f"{key}={text}"]
    return shlex.join(words)


def _parameters(request: RunRequest) -> dict[str, Any]:
    return {
        "recipe": request.source,
        "overrides": list(request.overrides),
        "store": request.store or "",
    }


def _has_deployment(client: SyncPrefectClient, name: str) -> bool:
    try:
        client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False
    return True


def _block(text: str) -> str:
    """Lines that stay as they are."""
    return "```\n" + text.replace("```", "'''") + "\n```"


def _cell(text: str) -> str:
    """Text that breaks no table and starts no HTML."""
    short = text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."
    return re.sub(r"([\\`*_|\[\]<&])", r"\\\1", " ".join(short.split()))
