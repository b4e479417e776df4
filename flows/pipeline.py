"""The flows: the whole pipeline, and its parts on their own.

`python -m flows.pipeline demo` runs the pipeline, `python -m flows FLOW RUN` any of them, and
prefect.yaml makes each a deployment. Names, docstrings and types are what a server's form shows.
"""

if __name__ == "__main__":  # before Prefect is imported, because it reads its settings then
    from flows.cli import run_command

    run_command("pipeline")

import inspect
import shlex
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from prefect import Flow, flow, get_run_logger

from deepspec.artifacts.status import results, stored_report
from flows.flow_stages import STAGES_OF
from flows.parameters import Overrides, Recipe, Shards, StoreUrl, request_of, run_name
from flows.reporting import StageOutcome, publish_results
from flows.request import checked_run
from flows.tasks import run_stages

P = ParamSpec("P")
R = TypeVar("R")

MISSING_SHARDS = (
    "Only these of the missing shards, e.g. `17,18,40-52`; empty for all that is missing."
)
MISSING_UNITS = (
    "Only these units of a few prompts each, e.g. `17,18,40-52`; empty for all that are missing."
)


def form_flow(name: str, *, shards: str = MISSING_SHARDS) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Makes a function a flow of this name, its docstring completed by what its parameters mean.

    Prefect takes the descriptions in a deployment's form from the docstring, and from there alone.
    """
    meanings = {
        "recipe": "A recipe (`python -m deepspec recipes` lists them) "
        "or a run file ending in .yaml.",
        "overrides": "Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.",
        "shards": shards,
        "store": "Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.",
    }

    def make(function: Callable[P, R]) -> Flow[P, R]:
        lines = [f"    {one}: {meanings[one]}" for one in inspect.signature(function).parameters]
        summary = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = "\n".join([summary, "", "Args:", *lines])
        return flow(name=name, flow_run_name=run_name, persist_result=False)(function)

    return make


@form_flow("prepare")
def prepare(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """Prompts, the target's answers, and its hidden states; only what is missing is made."""
    return run_stages(request_of(recipe, overrides, store), STAGES_OF["prepare"], shards)


@form_flow("regenerate")
def regenerate(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """The target's answers to prompts that are in the store; only what is missing is made."""
    return run_stages(request_of(recipe, overrides, store), STAGES_OF["regenerate"], shards)


@form_flow("capture")
def capture(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """The target's hidden states over answers in the store; only what is missing is made."""
    return run_stages(request_of(recipe, overrides, store), STAGES_OF["capture"], shards)


@form_flow("train")
def train_draft(
    recipe: Recipe = "demo", overrides: Overrides = (), store: StoreUrl = ""
) -> list[StageOutcome]:
    """The draft, trained from its newest checkpoint if there is one."""
    return run_stages(request_of(recipe, overrides, store), STAGES_OF["train"])


@form_flow("evaluate", shards=MISSING_UNITS)
def evaluate_draft(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """Every benchmark decoded plainly and speculatively, and the report of the results."""
    request = request_of(recipe, overrides, store)
    outcomes = run_stages(request, STAGES_OF["evaluate"], shards)
    if outcomes[-1].status.sealed:
        run = checked_run(request)
        words = ["python", "-m", "deepspec", "report", *request.arguments()]
        publish_results(
            run.config.name,
            stored_report(run),
            results(run).benchmarks,
            report_url=f"{outcomes[-1].status.artifact_url}/report.html",
            command=shlex.join([*words, "--output", "report.html"]),
        )
    return outcomes


@form_flow("pipeline")
def pipeline(
    recipe: Recipe = "demo", overrides: Overrides = (), store: StoreUrl = ""
) -> list[StageOutcome]:
    """Prompts, answers, hidden states, draft, results, in order; only what is missing is made."""
    checked_run(request_of(recipe, overrides, store))
    outcomes: list[StageOutcome] = []
    for part in (prepare, train_draft, evaluate_draft):
        # The log of this run has nothing of what is logged in that one.
        get_run_logger().info("%s: begun as a run of its own", part.name)
        made = part(recipe=recipe, overrides=overrides, store=store)
        states = [f"{outcome.status.stage} {outcome.state}" for outcome in made]
        get_run_logger().info("%s: %s", part.name, ", ".join(states))
        outcomes += made
    return outcomes


FLOWS = {
    one.name: one for one in (pipeline, prepare, regenerate, capture, train_draft, evaluate_draft)
}
