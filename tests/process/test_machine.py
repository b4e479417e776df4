"""The GPUs of a machine, as CUDA counts them: from what is set, and from what the driver lists."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspec.errors import ConfigError
from deepspec.process import machine
from deepspec.process.machine import (
    driver_version,
    group_gpus,
    missing_compiler,
    missing_for_triton,
    visible_gpus,
)

WHOLE = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4aa9e4cc-1b7e-2a2b-7d2e-2f6c0b0a9d11)
"""
DIVIDED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4aa9e4cc-1b7e-2a2b-7d2e-2f6c0b0a9d11)
"""
PARTS = ["MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program of this name, with the given body, first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(body: str) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        return program

    return write


def printing(text: str) -> str:
    return f"cat <<'END'\n{text}END"


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("0,1", ["0", "1"]),
        (" 1, 0 ", ["1", "0"]),
        ("0,1,", ["0", "1"]),
        ("", []),
        (" ", []),
        (",", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("2,-1,3", ["2"]),
        ("GPU-5d5ba0d6", ["GPU-5d5ba0d6"]),
        ("MIG-c6d4f1ef, MIG-GPU-5d5ba0d6/1/0", ["MIG-c6d4f1ef", "MIG-GPU-5d5ba0d6/1/0"]),
    ],
)
def test_the_gpus_that_are_set_are_those_that_cuda_shows(
    value: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A blank stayed in a name, and -1, none and NoDevFiles counted as GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == gpus


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("gpu0", "'gpu0' is the name of no GPU"),
        ("all", "'all' is the name of no GPU"),
        ("0;1", "'0;1' is the name of no GPU"),
        ("0,,1", "'' is the name of no GPU"),
        ("0,1,0", "names a GPU twice"),
        ("1,01", "names a GPU twice"),
        ("MIG-a,MIG-a", "names a GPU twice"),
        ("0,GPU-5d5ba0d6", "mixes numbers"),
        ("GPU-5d5ba0d6,MIG-c6d4f1ef", "mixes numbers"),
    ],
)
def test_a_setting_of_which_cuda_would_show_less_is_refused(
    value: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(ConfigError, match=what) as caught:
        visible_gpus()
    assert repr(value) in caught.value.what
    assert caught.value.where == "CUDA_VISIBLE_DEVICES"


def test_without_a_setting_the_driver_lists_the_gpus(nvidia_smi):
    nvidia_smi(printing(WHOLE))
    assert visible_gpus() == ["0", "1"]


def test_a_divided_gpu_counts_by_its_parts(nvidia_smi):
    nvidia_smi(printing(DIVIDED))
    assert visible_gpus() == [*PARTS, "GPU-4aa9e4cc-1b7e-2a2b-7d2e-2f6c0b0a9d11"]


@pytest.mark.parametrize(
    "body",
    [
        "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9",
        "head -c 4000 /dev/urandom",
        "echo 'No devices found.'; exit 6",
        "exec /nonexistent",
    ],
)
def test_what_is_no_list_counts_as_none(nvidia_smi, body: str):
    nvidia_smi(body)
    assert visible_gpus() == []
    assert driver_version() is None


def test_a_program_that_cannot_be_run_counts_as_none(nvidia_smi):
    nvidia_smi("").write_bytes(b"\x7fELF of another machine")
    assert visible_gpus() == []


def test_one_that_hangs_is_given_up(nvidia_smi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "SMI_S", 0.3)
    nvidia_smi("exec sleep 30")
    started = time.monotonic()
    assert visible_gpus() == []
    assert time.monotonic() - started < 10


def test_the_version_of_the_driver_is_read(nvidia_smi):
    nvidia_smi("echo 535.183.01; echo 535.183.01")
    assert driver_version() == "535.183.01"


def test_what_triton_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without either, training attended densely and nothing said what to install."""
    monkeypatch.delenv("CC", raising=False)
    assert missing_for_triton() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_for_triton() == ["a C compiler (gcc)"]
    monkeypatch.setenv("CC", sys.executable)  # any program: Triton takes what is set
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    assert missing_for_triton() == [f"Python's headers ({tmp_path / 'Python.h'})"]


def test_lanes_of_several_gpus():
    assert group_gpus(["0", "1", "2", "3"], 2) == ["0,1", "2,3"]
    assert group_gpus(["GPU-a", "MIG-b"], 1) == ["GPU-a", "MIG-b"]
    assert group_gpus([], 2) == []
    with pytest.raises(ConfigError, match="6 GPUs cannot be dealt to lanes of 4") as caught:
        group_gpus([*"012345"], 4)
    assert caught.value.fix.startswith("set it to 1 or 2 or 3 or 6")
    with pytest.raises(ConfigError, match="one part of a divided GPU"):
        group_gpus(["MIG-a", "MIG-b"], 2)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert missing_compiler(on_gpu=True) == missing_compiler(on_gpu=False) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_compiler(on_gpu=True) == ["a C compiler (gcc)"]
    assert missing_compiler(on_gpu=False) == ["a C++ compiler (g++)"]


def test_finding_gpus_loads_no_pytorch():
    code = (
        "import sys; from deepspec.process.machine import visible_gpus;"
        "visible_gpus(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
