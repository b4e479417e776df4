"""From hidden states to a draft."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("train")

from prefect import flow

from deepspec.launch import Request
from flows.reporting import StageOutcome
from flows.tasks import Overrides, Recipe, StoreUrl, run_stages

STAGES = ("train",)


@flow(name="train", flow_run_name="train {recipe}", persist_result=False)
def train(recipe: Recipe = "demo", overrides: Overrides = None, store: StoreUrl = None) -> list[StageOutcome]:
    """The draft, trained from its newest checkpoint if there is one."""
    return run_stages(Request(recipe, tuple(overrides or ()), store), STAGES)
