"""From prompts to hidden states: everything that training reads."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.cli import main

    main("prepare")

from prefect import flow

from deepspec.launch import Request
from flows.reporting import StageOutcome
from flows.tasks import run_stages

STAGES = ("demo", "prompts", "answers", "hidden")


@flow(name="prepare", flow_run_name="prepare {recipe}", persist_result=False)
def prepare(recipe: str = "demo", overrides: list[str] | None = None, store: str | None = None) -> list[StageOutcome]:
    """Prompts, the target's answers, and its hidden states; only what is missing in the store is made.

    Args:
        recipe: A recipe (`python -m deepspec recipes` lists them) or a run file ending in .yaml.
        overrides: Fields to change, one `section.field=value` each, e.g. `train.lr=3e-4`.
        store: Artifact store, a folder or s3://bucket/prefix; empty takes the recipe's.
    """
    return run_stages(Request(recipe, tuple(overrides or ()), store), STAGES)
