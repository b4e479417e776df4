"""Takes the pictures in docs/images: `python -m tests.flows.screenshots [FOLDER]`, some minutes on
two cores.

A server with its UI and a worker of its own, a small pipeline, a run of which shards fail, and a
browser that looks at them.
"""

import sys
import tempfile
from pathlib import Path

from tests.conftest import REPOSITORY, TINY, write_jsonl
from tests.flows.browser import Browser, browser
from tests.flows.test_deployment import Site, opened_site

SMALL = [
    *TINY,
    "prompts.limit=40",
    "train.max_steps=100",
    "train.checkpoint_steps=20",
    "resources.runner.shards_per_task=2",
    "resources.devices.lanes=2",
]


def take_pictures(site: Site, page: Browser, folder: Path) -> None:
    """Each page once everything on it is there."""
    (pipeline,) = site.post(
        "flow_runs/filter", flow_runs={"name": {"any_": ["pipeline demo"]}}
    ).json()
    page.open(
        f"{site.url.removesuffix('/api')}/runs/flow-run/{pipeline['id']}",
        "Completed",
        "Subflow Runs",
    )
    page.click("Subflow Runs")
    # the graph above them is a canvas, without words
    page.wait_for("prepare demo", "train demo", "evaluate demo")
    page.settle()
    page.picture(folder / "pipeline-run.png")
    for key, words, name in [
        ("dspark-demo-answers-lanes", ("lane #1",), "lanes"),
        ("dspark-demo-answers-throughput", ("answers: throughput",), "throughput"),
        ("dspark-demo-train-curves", ("loss and acceptance",), "training"),
        ("dspark-demo-benchmarks", ("speed-up",), "results"),
        ("flaky-failure", ("may another try help?",), "failed-shards"),
    ]:
        page.open(site.page(site.artifact(key)), *words)
        page.settle()
        page.picture(folder / f"{name}.png")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, opened_site(Path(scratch), {}) as site:
        prompts = [{"prompt": f"question {number}"} for number in range(48)]
        write_jsonl(site.run_file.parent / "prompts.jsonl", prompts)
        (site.run_file.parent / "broken").touch()
        site.deployment_run("prepare/demo", code=1, recipe=str(site.run_file))
        site.deployment_run(
            "pipeline/demo", overrides=SMALL, store=str(Path(scratch) / "store"), timeout=1800
        )
        with browser(Path(scratch) / "profile", size=(1200, 760)) as page:
            take_pictures(site, page, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs" / "images")
