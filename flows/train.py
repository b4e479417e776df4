"""From hidden states to a draft."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("train")

from prefect import flow

from flows.parameters import Overrides, Recipe, StoreUrl, request_of, run_name
from flows.reporting import StageOutcome
from flows.tasks import run_stages

STAGES = ("train",)


@flow(name="train", flow_run_name=run_name, persist_result=False)
def train(
    recipe: Recipe = "demo", overrides: Overrides = (), store: StoreUrl = ""
) -> list[StageOutcome]:
    """The draft, trained from its newest checkpoint if there is one.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    return run_stages(request_of(recipe, overrides, store), STAGES)
