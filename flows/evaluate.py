"""From a draft to results."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("evaluate")

from prefect import flow

from deepspec.launch import Request
from deepspec.stages import report_text
from flows.reporting import StageOutcome, publish_results
from flows.request import open_run
from flows.tasks import run_stages

STAGES = ("evaluate",)


@flow(name="evaluate", flow_run_name="evaluate {recipe}", persist_result=False)
def evaluate(recipe: str = "demo", overrides: list[str] | None = None, store: str | None = None) -> list[StageOutcome]:
    """Every benchmark decoded plainly and speculatively, and the report of the results.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    request = Request(recipe, tuple(overrides or ()), store)
    outcomes = run_stages(request, STAGES)
    config = open_run(request)
    publish_results(config.name, report_text(config))
    return outcomes
