"""Run every benchmark and print one table: `python -m benchmarks [NAME ...]`.

A benchmark is a script here whose last line of output is one JSON object {name, ratios, goals, ok,
machine}. It warms up, alternates the sides it compares, and reports ratios within one run, because
machines are shared and noisy.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent


def run(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=FOLDER.parent,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return (
        json.loads(lines[-1])
        if done.returncode == 0 and lines
        else {"name": name, "ratios": {}, "goals": {}, "ok": False}
    )


def main(names: list[str]) -> int:
    known = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.stderr.write(
            f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(known)}\n"
        )
        return 2
    table, results = (
        Table("benchmark", "ratio", "measured", "goal", "met"),
        [run(name) for name in names or known],
    )
    for result in results:
        if not result["ratios"]:
            table.add_row(result["name"], "(failed)", "", "", "no")
        for ratio, measured in result["ratios"].items():
            goal = result["goals"].get(ratio)
            met = "" if goal is None else "yes" if measured >= goal else "no"
            table.add_row(
                result["name"], ratio, f"{measured:.2f}", "" if goal is None else f"{goal:g}", met
            )
    Console().print(table)
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
