"""From a draft to results."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("evaluate")

import shlex

from prefect import flow

from deepspec.artifacts.status import report_text, results
from flows.parameters import Overrides, Recipe, Shards, StoreUrl, request_of, run_name
from flows.reporting import StageOutcome, publish_results
from flows.request import open_run
from flows.tasks import run_stages

STAGES = ("evaluate",)


@flow(name="evaluate", flow_run_name=run_name, persist_result=False)
def evaluate(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """Every benchmark decoded plainly and speculatively, and the report of the results.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        shards: Only these units of a few prompts each, e.g. `17,18,40-52`; empty for all that are
            missing.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    request = request_of(recipe, overrides, store)
    outcomes = run_stages(request, STAGES, shards)
    if outcomes[-1].status.sealed:
        config = open_run(request)
        command = shlex.join(
            ["python", "-m", "deepspec", "report", *request.arguments(), "--output", "report.html"]
        )
        report_url = f"{outcomes[-1].status.artifact_url}/report.html"
        publish_results(
            config.name, report_text(config), results(config)["benchmarks"], report_url, command
        )
    return outcomes
