"""From prompts to hidden states: everything that training reads."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("prepare")

from prefect import flow

from flows.parameters import Overrides, Recipe, Shards, StoreUrl, request_of, run_name
from flows.reporting import StageOutcome
from flows.tasks import run_stages

STAGES = ("demo", "prompts", "answers", "hidden")


@flow(name="prepare", flow_run_name=run_name, persist_result=False)
def prepare(
    recipe: Recipe = "demo", overrides: Overrides = (), shards: Shards = "", store: StoreUrl = ""
) -> list[StageOutcome]:
    """Prompts, the target's answers, and its hidden states; only what is missing in the store is
    made.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        shards: Only these of the missing shards, e.g. `17,18,40-52`; empty for all that is missing.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    return run_stages(request_of(recipe, overrides, store), STAGES, shards)
