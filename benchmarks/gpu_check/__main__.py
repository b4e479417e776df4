"""The one script for whoever has a GPU for ten minutes: `python -m benchmarks.gpu_check OUT`.

It needs what the machine has of PyTorch and transformers, and for all else a folder of wheels
(--wheels). Each section is a process of its own with a limit in seconds; what it finds is in OUT at
once, and no section stops another. The end is a table for docs/performance.md; it exits with 1
where anything that was asserted does not hold. --rehearse runs all of it on a CPU, in tiny shapes.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.findings import DONE, LOG, TABLE, Findings, read_outcomes, table

REPOSITORY = Path(__file__).resolve().parents[2]
# The sections in their order, and the seconds that each may take: 595 together.
LIMITS = {
    "machine": 20,
    "flex": 85,
    "suite": 60,
    "demo": 185,
    "loss": 30,
    "step": 75,
    "capture": 35,
    "decoding": 50,
    "ranks": 25,
    "memory": 30,
}
REHEARSAL = 10  # times as long: two cores do what a GPU and sixteen would


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for what is found")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels, or of packages unpacked, for what is missing"
    )
    parser.add_argument("--only", action="append", choices=LIMITS, help="may be repeated")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in tiny shapes")
    parsed = parser.parse_args(words)
    if parsed.wheels is not None and not parsed.wheels.is_dir():
        parser.error(f"--wheels {parsed.wheels}: there is no such folder")
    return parsed


def unpacked(wheels: Path, folder: Path) -> Path:
    """What to put on the path: the wheels in `folder`, or `wheels` itself where it holds none.

    A wheel is a zip file of the packages in it: nothing has to be installed.
    """
    files = sorted(wheels.glob("*.whl"))
    for wheel in files:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    return folder if files else wheels


def environment(packages: Path | None, scratch: Path) -> dict[str, str]:
    paths = [str(REPOSITORY), *([str(packages)] if packages else [])]
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as every verb sets it
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }


def run_section(command: Sequence[str], findings: Findings, limit_s: float, **how: object) -> None:
    """Run one section to its end or its limit; what it leaves running is ended with it."""
    began = time.monotonic()
    findings.add(began=time.strftime("%Y-%m-%d %H:%M:%S"))
    with (findings.path.parent / LOG).open("ab") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **how
        )
        try:
            status = child.wait(timeout=limit_s)
            ended = DONE if status == 0 else f"ended with {status}: see {LOG}"
        except subprocess.TimeoutExpired:
            ended = f"was stopped after its {limit_s:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the usual case: nothing is left
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    findings.add(ended=ended, seconds=round(time.monotonic() - began, 1))


def main(words: Sequence[str]) -> int:
    chosen = arguments(words)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        scratch = Path(name)
        packages = unpacked(chosen.wheels.resolve(), scratch / "wheels") if chosen.wheels else None
        how = {"cwd": REPOSITORY, "env": environment(packages, scratch)}
        for section in chosen.only or LIMITS:
            folder = scratch / section
            folder.mkdir()
            command = [sys.executable, "-m", "benchmarks.gpu_check.section"]
            command += [section, str(out), str(folder), *(["--rehearse"] * chosen.rehearse)]
            limit_s = LIMITS[section] * (REHEARSAL if chosen.rehearse else 1)
            run_section(command, Findings(out, section), limit_s, **how)
            outcomes = read_outcomes(out)
            (out / TABLE).write_text(table(outcomes), encoding="utf-8")
    print(table(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
