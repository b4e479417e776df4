"""The whole pipeline: `python -m flows.pipeline demo`, or the deployment `pipeline/demo`."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, because it reads its settings then
    from flows.cli import main

    main("pipeline")

from prefect import flow

from deepspec.launch import Request
from flows.evaluate import evaluate
from flows.prepare import prepare
from flows.reporting import StageOutcome
from flows.request import open_run
from flows.tasks import Overrides, Recipe, StoreUrl
from flows.train import train


@flow(name="pipeline", flow_run_name="pipeline {recipe}", persist_result=False)
def pipeline(recipe: Recipe = "demo", overrides: Overrides = None, store: StoreUrl = None) -> list[StageOutcome]:
    """Prompts, answers, hidden states, draft, results: one after the other, each only where it is missing."""
    open_run(Request(recipe, tuple(overrides or ()), store))
    return [outcome for part in (prepare, train, evaluate) for outcome in part(recipe, overrides, store)]
