"""From hidden states to a draft."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("train")

from prefect import flow

from deepspec.launch import Request
from flows.reporting import StageOutcome
from flows.tasks import run_stages

STAGES = ("train",)


@flow(name="train", flow_run_name="train {recipe}", persist_result=False)
def train(recipe: str = "demo", overrides: list[str] | None = None, store: str | None = None) -> list[StageOutcome]:
    """The draft, trained from its newest checkpoint if there is one.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    return run_stages(Request(recipe, tuple(overrides or ()), store), STAGES)
