"""The suite's own tests that need a GPU, and those of what depends on versions of PyTorch and
transformers.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check.section import Bench

TESTS = Path(__file__).resolve().parents[2] / "tests"
MARK = "@pytest.mark.gpu"
ON_GPU = sorted(str(path) for path in TESTS.rglob("test_*.py") if MARK in path.read_text())
OF_VERSIONS = ["model/test_chunked_loss.py", "target/test_model.py", "target/test_attention.py"]


def check(bench: Bench) -> None:
    run(bench, "tests marked `gpu`", ["-m", "gpu", *ON_GPU], needed=not bench.rehearse)
    others = OF_VERSIONS[:1] if bench.rehearse else OF_VERSIONS
    run(bench, "tests of versions", [str(TESTS / name) for name in others], needed=True)


def run(bench: Bench, what: str, words: list[str], *, needed: bool) -> None:
    """All tests pass, and, where that is `needed`, some of them ran."""
    report = bench.scratch / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *words]
    if importlib.util.find_spec("xdist") and not bench.rehearse:
        command += ["-n", "4"]  # most of a test's time on a GPU is compiling, on the CPU
    subprocess.run(command, check=False, cwd=TESTS.parent, env=os.environ)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if {"failure", "error"} & {x.tag for x in case}]
    num_passed = sum(not list(case.iter("skipped")) for case in cases) - len(failed)
    ok = not failed and (num_passed > 0 or not needed)
    bench.findings.check(what, ok, f"{num_passed} pass, failed: {', '.join(failed) or 'none'}")
