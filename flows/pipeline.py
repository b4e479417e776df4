"""The whole pipeline: `python -m flows.pipeline demo`, or the deployment `pipeline/demo`."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, because it reads its settings then
    from flows.cli import main

    main("pipeline")

from prefect import flow, get_run_logger

from flows.evaluate import evaluate
from flows.parameters import Overrides, Recipe, StoreUrl, request_of, run_name
from flows.prepare import prepare
from flows.reporting import StageOutcome
from flows.request import open_run
from flows.train import train


@flow(name="pipeline", flow_run_name=run_name, persist_result=False)
def pipeline(
    recipe: Recipe = "demo", overrides: Overrides = (), store: StoreUrl = ""
) -> list[StageOutcome]:
    """Prompts, answers, hidden states, draft, results: one after the other, each only where it is
    missing.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    open_run(request_of(recipe, overrides, store))
    outcomes: list[StageOutcome] = []
    for part in (prepare, train, evaluate):
        # who watches this run hears nothing of that one
        get_run_logger().info("%s: a run of its own, begun", part.name)
        made = part(recipe=recipe, overrides=overrides, store=store)
        get_run_logger().info(
            "%s: %s",
            part.name,
            ", ".join(f"{outcome.status.stage} {outcome.state}" for outcome in made),
        )
        outcomes += made
    return outcomes
