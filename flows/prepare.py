"""From prompts to hidden states: everything that training reads."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("prepare")

from prefect import flow

from deepspec.launch import Request
from flows.reporting import StageOutcome
from flows.tasks import Overrides, Recipe, StoreUrl, run_stages

STAGES = ("demo", "prompts", "answers", "hidden")


@flow(name="prepare", flow_run_name="prepare {recipe}", persist_result=False)
def prepare(recipe: Recipe = "demo", overrides: Overrides = None, store: StoreUrl = None) -> list[StageOutcome]:
    """Prompts, the target's answers, and its hidden states; only what is missing in the store is made."""
    return run_stages(Request(recipe, tuple(overrides or ()), store), STAGES)
