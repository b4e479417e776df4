"""The check for whoever has a GPU for ten minutes: what can be seen of it without one."""

import importlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.findings import FINDINGS, LOG, TABLE, Findings, read_outcomes, table
from benchmarks.gpu_check.section import Bench
from deepspec.model import attention
from tests.conftest import REPOSITORY, TINY
from tests.gpu.tagged import CUDA, GpuPretence
from tests.gpu.test_train_step import masked_attention

# What the libraries of a machine with a GPU need not have: only servers of answers, data sets of
# the hub, S3, flows and ZeRO take these.
ABSENT = (
    *("prefect", "prefect_ray", "ray", "fastapi", "datasets", "openai"),
    *("s3fs", "aiobotocore", "botocore", "obstore", "deepspeed"),
)
WITHOUT = f"""
import importlib.machinery

find = importlib.machinery.PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT!r} else find(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_others)
"""


def run(*words: str, timeout_s: float = 280) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_the_sections_have_ten_minutes_together():
    assert sum(gpu_check.LIMITS.values()) <= 600


def test_a_section_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path):
    findings = Findings(tmp_path, "flex")
    hanging = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid); "
        "sys.stdout.flush(); time.sleep(600)"
    )
    gpu_check.run_section([sys.executable, "-c", hanging], findings, 2)
    (outcome,) = read_outcomes(tmp_path).values()
    assert outcome.ended == "was stopped after its 2 seconds"
    assert outcome.failures
    pid = int((tmp_path / LOG).read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_section_found_before_it_died_counts(tmp_path: Path):
    findings = Findings(tmp_path, "loss")
    dying = (
        "import os; from pathlib import Path; from benchmarks.gpu_check.findings import Findings; "
        f"Findings(Path({str(tmp_path)!r}), 'loss').check('found', ok=True); os.abort()"
    )
    environment = gpu_check.environment(None, tmp_path)
    gpu_check.run_section([sys.executable, "-c", dying], findings, 60, env=environment)
    (outcome,) = read_outcomes(tmp_path).values()
    assert [check["check"] for check in outcome.checks] == ["found"]
    assert outcome.failures == [f"ended with -6: see {LOG}"]


def test_the_newest_run_of_a_section_counts_and_the_table_has_what_failed(tmp_path: Path):
    assert read_outcomes(tmp_path) == {}
    for section, ok in (("machine", True), ("flex", False), ("loss", True), ("flex", True)):
        findings = Findings(tmp_path, section)
        findings.add(began="now")
        findings.check("as dense", ok, seen="a | b\nc")
        findings.figure("forward, ms", 1 / 3)
        if section == "machine":
            findings.figure("GPU", "H200")
        findings.add(ended="done", seconds=2.0)
        outcomes = read_outcomes(tmp_path)
        assert bool(outcomes[section].failures) is not ok
        if not ok:
            assert "| flex | 0 of 1 | 2 | as dense: a \\| b c |" in table(outcomes)
    assert list(outcomes) == ["machine", "flex", "loss"]
    lines = table(outcomes).splitlines()
    assert "GPU H200" in lines[0]
    assert "| flex | 1 of 1 | 2 |  |" in lines
    assert "| flex: forward, ms | 0.3333 |" in lines
    assert not any("machine: GPU" in line for line in lines)


def test_a_section_that_asserts_nothing_is_no_success(tmp_path: Path):
    findings = Findings(tmp_path, "flex")
    findings.add(began="now")
    findings.add(ended="done", seconds=1.0)
    assert read_outcomes(tmp_path)["flex"].failures == ["nothing was checked"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_reports_that_and_computes_nothing(tmp_path: Path):
    ended = run("-m", "benchmarks.gpu_check", str(tmp_path), "--only", "step")
    assert ended.returncode == 1, ended.stderr
    (outcome,) = read_outcomes(tmp_path).values()
    assert [check["check"] for check in outcome.checks] == ["the GPU can be used"]
    assert "there is no GPU here" in outcome.failures[0]
    assert ended.stdout.endswith((tmp_path / TABLE).read_text() + "\n")


def test_a_folder_of_wheels_is_unpacked_and_comes_before_the_machines_own(tmp_path: Path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tenacity-99-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tenacity/__init__.py", "version = 99\n")
    for folder in (wheels, tmp_path / "site"):  # packed, and as it was unpacked then
        packages = gpu_check.unpacked(folder, tmp_path / "site")
        child = subprocess.run(
            [sys.executable, "-c", "import tenacity, deepspec; print(tenacity.version)"],
            env=gpu_check.environment(packages, tmp_path),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout == "99\n"


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path: Path, capsys):
    for words in (["--wheels", str(tmp_path / "none")], ["--only", "nonsense"]):
        with pytest.raises(SystemExit) as refused:
            gpu_check.main([str(tmp_path / "out"), *words])
        assert refused.value.code == 2
        assert words[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_verbs_and_sections_need_nothing_of_flows_servers_and_remote_stores(store: Path):
    """Prefect cannot be taken to a machine without a network, nor what else is not there."""
    sets = [word for override in TINY for word in ("--set", override)]
    code = f"""{WITHOUT}
import importlib
from benchmarks.gpu_check.__main__ import LIMITS
from deepspec.__main__ import app
for name in LIMITS:
    importlib.import_module(f"benchmarks.gpu_check.{{name}}")
for verb in ("prompts", "answers", "hidden", "train", "evaluate", "status", "plan", "devices"):
    app([verb, "demo", "--store", {str(store)!r}, *{sets!r}], standalone_mode=False)
"""
    ended = run("-c", code)
    assert ended.returncode == 0, ended.stderr[-3000:]
    shutil.rmtree(store)


class HostGenerator:
    """PyTorch without CUDA has no generator on a GPU."""

    def __new__(cls, _device: object = "cpu", made: type = torch.Generator) -> Any:
        return made("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("section", ["loss", "flex", "decoding"])
def test_a_section_mixes_no_devices(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rehearsal on a CPU does not see it, and two sections did once plans were made on the host:
    the first ten minutes of a GPU would have gone.
    """
    module = importlib.import_module(f"benchmarks.gpu_check.{section}")
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    torch._dynamo.reset()  # imported, before what it annotates is replaced
    answers = {
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode")),
        **dict.fromkeys(("max_memory_allocated", "memory_allocated"), 0),
        "is_bf16_supported": True,
        "get_device_properties": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(attention, "flex_attention", masked_attention)
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    monkeypatch.setattr(attention, "kernel_options", lambda *_: None)  # of the real kernel
    if section == "flex":
        monkeypatch.setattr(module, "training_path", lambda *_, **__: "dense")
    findings = Findings(tmp_path, section)
    findings.add(began="now")
    with GpuPretence():
        module.check(Bench(findings, tmp_path, CUDA, rehearse=True))
    findings.add(ended="done", seconds=1.0)
    assert read_outcomes(tmp_path)[section].failures == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_rehearsal_runs_every_section(tmp_path: Path):
    ended = run("-m", "benchmarks.gpu_check", str(tmp_path), "--rehearse", timeout_s=3500)
    assert ended.returncode == 0, ended.stdout + (tmp_path / LOG).read_text()[-5000:]
    outcomes = read_outcomes(tmp_path)
    assert list(outcomes) == list(gpu_check.LIMITS)
    facts = [json.loads(line) for line in (tmp_path / FINDINGS).read_text().splitlines()]
    assert sum("check" in fact for fact in facts) > 60
    assert {path.name for path in tmp_path.iterdir()} == {FINDINGS, LOG, TABLE}
