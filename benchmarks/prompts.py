"""The prompts stage on 100,000 synthetic conversations, against a plain `datasets` map + to_json
over the same file.

The plain side does no more than drop what the assistant said, hash the rest and write it; the stage
also checks roles, tools and duplicates, splits, cuts into shards and commits them with checksums.
Peak memory is that of 1.3 million rows in a process of its own. Goals: half the speed of the plain
side, and under 1 GiB.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets

from benchmarks._measure import alternate, peak_bytes, result
from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from deepspec.prompts.stage import run_prompts

ROWS, MANY = 100_000, 1_300_000
ROUNDS = 3
GOALS = {"stage/plain": 0.5, "1 GiB/peak of 1.3 M rows": 1.0}
WORDS = [
    f"{syllable}{ending}"
    for syllable in ("ka", "lo", "mi", "pra", "te", "us")
    for ending in ("n", "ren", "to", "s", "ling")
]


def conversations(count: int, *, words: int) -> Iterator[str]:
    """Lines of JSONL: half of them one turn, the rest two or three, with a system message now
    and then.
    """
    rng = random.Random(3)
    for number in range(count):
        turns = rng.choice([1, 1, 2, 3])
        said = [{"from": "system", "value": "Be brief."}] if rng.random() < 0.1 else []
        for turn in range(turns):
            said.append(
                {
                    "from": "human",
                    "value": f"{number}.{turn} " + " ".join(rng.choices(WORDS, k=words)),
                }
            )
            said.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=3 * words))})
        yield json.dumps({"conversations": said}) + "\n"


def make_run(store: Path, source: Path) -> RunConfig:
    """A run over the file, whose target is a name that nothing here loads."""
    files = json.dumps({"kind": "files", "paths": [str(source)]})
    return load_run(
        "dspark-qwen3-4b",
        [f"prompts.source={files}", "prompts.limit=null", "resources.storage.min_free_gb=0"],
        store=str(store),
    )


def stage(folder: Path, source: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as store:
        began = time.perf_counter()
        run_prompts(Run(make_run(Path(store), source)))
        return time.perf_counter() - began


def plain_row(row: dict) -> dict:
    asked = [part for part in row["conversations"] if part["from"] != "gpt"]
    text = json.dumps(asked)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "messages": text}


def plain(folder: Path, source: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
        rows.map(plain_row, remove_columns=rows.column_names).to_json(
            str(Path(cache) / "out.jsonl")
        )
        return time.perf_counter() - began


def peak_of_many(folder: Path) -> int:
    """Peak memory of the stage over 1.3 million rows, in a process of its own."""
    source = folder / "many.jsonl"
    with source.open("w") as lines:
        lines.writelines(conversations(MANY, words=10))
    command = [sys.executable, "-m", "benchmarks.prompts", str(folder / "store"), str(source)]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def main() -> dict[str, object]:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        source = folder / "some.jsonl"
        with source.open("w") as lines:
            lines.writelines(conversations(ROWS, words=60))
        seconds = alternate(
            {"stage": lambda: stage(folder, source), "plain": lambda: plain(folder, source)},
            rounds=ROUNDS,
        )
        peak = peak_of_many(folder)
    ratios = {
        "stage/plain": seconds["plain"] / seconds["stage"],
        "1 GiB/peak of 1.3 M rows": 2**30 / peak,
    }
    rows_per_s = {f"{side}_rows_per_s": round(ROWS / taken) for side, taken in seconds.items()}
    return result("prompts", ratios, GOALS, **rows_per_s, peak_mib=round(peak / 2**20))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_prompts(Run(make_run(Path(sys.argv[1]), Path(sys.argv[2]))))
        print(peak_bytes())
    else:
        print(json.dumps(main()))
