"""What the sections find, one JSON object a line, written at once; and the table of all of it.

The folder has three files, and a later run adds to them: `findings.jsonl`, of which the newest run
of each section counts, `log.txt` with all that the sections print, and `table.md`. Nothing but
Python's own library is imported here: the wheels are not on the path yet.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

FINDINGS, LOG, TABLE = "findings.jsonl", "log.txt", "table.md"
DONE = "done"
# figures of the section `machine` that stand above the table
MACHINE = ("date", "GPU", "driver", "torch", "CUDA", "Triton", "transformers", "Python")


class Findings:
    """Where one section writes what it finds."""

    def __init__(self, folder: Path, section: str) -> None:
        self.path, self.section = folder / FINDINGS, section

    def add(self, **facts: Any) -> None:
        line = json.dumps({"section": self.section, **facts}, default=str)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
        print(line, flush=True)

    def check(self, what: str, ok: object, seen: object = "") -> None:
        """An assertion: one that does not hold fails the run, and nothing stops."""
        self.add(check=what, ok=bool(ok), seen=seen)

    def figure(self, name: str, value: object) -> None:
        """Something measured, rounded to four digits; the unit is in the name."""
        self.add(figure=name, value=float(f"{value:.4g}") if isinstance(value, float) else value)


class Outcome(NamedTuple):
    """The newest run of a section."""

    ended: str  # DONE, or how it ended before that
    seconds: float
    checks: list[dict[str, Any]]
    figures: dict[str, Any]

    @property
    def failures(self) -> list[str]:
        """What did not hold, one line each; a section that asserted nothing is a failure."""
        failed = [f"{each['check']}: {each['seen']}" for each in self.checks if not each["ok"]]
        if self.ended != DONE:
            failed.append(self.ended)
        return failed if self.checks or failed else ["nothing was checked"]


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """The newest run of each section, in the order in which they were first run."""
    path, found = folder / FINDINGS, dict[str, Outcome]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        fact = json.loads(line)
        section = fact["section"]
        if "began" in fact:
            found[section] = Outcome("has not ended", 0.0, [], {})
        elif "check" in fact:
            found[section].checks.append(fact)
        elif "figure" in fact:
            found[section].figures[fact["figure"]] = fact["value"]
        else:
            found[section] = found[section]._replace(ended=fact["ended"], seconds=fact["seconds"])
    return found


def table(outcomes: dict[str, Outcome]) -> str:
    """What was seen, as Markdown to be pasted into docs/performance.md."""
    machine = outcomes["machine"].figures if "machine" in outcomes else {}
    known = [f"{name} {machine[name]}" for name in MACHINE if machine.get(name) is not None]
    lines = [f"`benchmarks/gpu_check/`: {', '.join(known) or 'no machine was looked at'}", ""]
    lines += ["| section | checks that hold | seconds | what does not hold |"]
    lines += ["| --- | --- | --- | --- |"]
    for section, (_, seconds, checks, _) in outcomes.items():
        failures = "; ".join(map(_cell, outcomes[section].failures))
        held = f"{sum(each['ok'] for each in checks)} of {len(checks)}"
        lines.append(f"| {section} | {held} | {seconds:.0f} | {failures} |")
    lines += ["", "| measured | |", "| --- | --- |"]
    lines += [
        f"| {section}: {_cell(name)} | {_cell(value)} |"
        for section, outcome in outcomes.items()
        for name, value in outcome.figures.items()
        if section != "machine" or name not in MACHINE
    ]
    return "\n".join([*lines, ""])


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
