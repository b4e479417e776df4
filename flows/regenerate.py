"""From prompts to the target's answers."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("regenerate")

from prefect import flow

from flows.parameters import Overrides, Recipe, Shards, StoreUrl, request_of, run_name
from flows.reporting import StageOutcome
from flows.tasks import run_stages

STAGES = ("answers",)


@flow(name="regenerate", flow_run_name=run_name, persist_result=False)
def regenerate(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """The target's answers to prompts that are there; only what is missing in the store is made.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        shards: Only these of the missing shards, e.g. `17,18,40-52`; empty for all that is missing.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    return run_stages(request_of(recipe, overrides, store), STAGES, shards)
