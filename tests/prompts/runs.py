"""Small sources of prompts, and the stage run on them."""

import json
from pathlib import Path

from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run


def conversation(number: int) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": f"question {number}"},
            {"from": "gpt", "value": f"answer {number}"},
        ]
    }


def run_files(store: Path, *paths: Path, shard_rows: int = 4, **settings: object):
    source = json.dumps({"kind": "files", "paths": [str(path) for path in paths]})
    overrides = [
        f"prompts.source={source}",
        f"prompts.shard_rows={shard_rows}",
        "prompts.limit=null",
    ]
    return run_prompts(
        Run(
            tiny_run(
                store, *overrides, *(f"prompts.{key}={value}" for key, value in settings.items())
            )
        )
    )


def all_rows(artifact) -> list[dict]:
    return [
        row
        for record in artifact.records().values()
        for row in read_table(artifact.fetch_shard(record)).to_pylist()
    ]
