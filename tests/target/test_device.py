"""The device is the GPU or, where none is visible, the CPU: never the CPU because a GPU failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import backend_registration

from deepspec import __main__ as door
from deepspec.artifacts.run import Run
from deepspec.errors import ConfigError, DeepSpecError, TransientError
from deepspec.target.device import check_placement, choose_device, placement
from deepspec.train.loop import run_train
from tests.conftest import REPOSITORY, tiny_run

without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build")


@pytest.fixture
def built_for_cuda_13(monkeypatch: pytest.MonkeyPatch):
    """PyTorch as PyPI has it, where no GPU can be used."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\n")

    monkeypatch.setattr(torch.cuda, "init", fail)


def give_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int = 1) -> None:
    """Let PyTorch report GPUs of a compute capability; what is computed there raises."""
    for name, value in {
        "is_available": True,
        "device_count": count,
        "current_device": 0,
        "get_device_name": "Tesla T4",
        "get_device_capability": capability,
        "get_arch_list": ["sm_80", "sm_90"],
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def computing(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    ones = torch.ones

    def on_gpu(*shape: int, device: torch.device) -> torch.Tensor:
        if error is not None:
            raise error
        return ones(*shape)

    monkeypatch.setattr(torch, "ones", on_gpu)


def refused(device: str = "auto", *, dtype: str = "bfloat16", index: int | None = None):
    with pytest.raises(DeepSpecError) as caught:
        choose_device(device, dtype=dtype, index=index)
    return caught.value


@pytest.mark.parametrize("hidden", ["", "-1", "none", "NoDevFiles"])
def test_where_every_gpu_is_hidden_it_is_the_cpu(hidden: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto", dtype="bfloat16").type == "cpu"


@without_cuda
def test_a_gpu_that_is_demanded_and_hidden_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    error = refused("cuda")
    assert error.what == "there is no GPU here: CUDA_VISIBLE_DEVICES hides them all"


@without_cuda
def test_a_build_without_cuda_beside_a_gpu_is_an_error(tmp_path: Path):
    """Eight GPUs gave eight ranks on the CPU, without a word."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncase $1 in -L) cat {tmp_path}/list;; *) echo 580.65.06;; esac\n")
    smi.chmod(0o755)
    (tmp_path / "list").write_text(
        "GPU 0: NVIDIA L4 (UUID: GPU-0a)\nGPU 1: NVIDIA L4 (UUID: GPU-1b)\n"
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)

    def devices(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deepspec", "devices", "demo", *overrides]
        options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run([*command, "--store", str(tmp_path)], env=environment, **options)

    refused = devices()
    assert refused.returncode == 2
    error = refused.stderr[refused.stderr.index("error: ") :]
    assert f"GPU 0, 1 cannot be used: PyTorch {torch.__version__} is a build without CUDA" in error
    assert "the driver here is 580.65.06" in error
    assert "install PyTorch's CUDA build" in error and "resources.devices.type=cpu" in error
    assert devices("--set", "resources.devices.type=cpu").stdout == "device       CPU\n"


@without_cuda
def test_training_ends_before_it_reads_anything(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(captured, tmp_path / "store")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run = Run(tiny_run(tmp_path / "store"))
    with pytest.raises(ConfigError, match="GPU 0 cannot be used"):
        run_train(run)
    assert run.artifact("train").info() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled = Run(tiny_run(tmp_path / "store", "resources.training.compile=true"))
    with pytest.raises(ConfigError, match=r"cannot be compiled here: a C\+\+ compiler"):
        run_train(compiled)
    assert run.artifact("train").info() is None


@pytest.mark.parametrize(
    ("driver", "has", "fix"),
    [
        ("535.183.01", "the driver here is 535.183.01", "update the driver, or install a build"),
        ("580.65.06", "the driver here is 580.65.06", "see what `nvidia-smi` reports"),
        (None, "no NVIDIA driver is found here", "install the driver (in a container"),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.usefixtures("built_for_cuda_13")
def test_an_unusable_gpu_is_an_error_with_driver_and_cuda_version(
    device: str, driver: str | None, has: str, fix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deepspec.target.device.driver_version", lambda: driver)
    error = refused(device)
    assert isinstance(error, ConfigError)
    assert f"GPU 0, 1 cannot be used: PyTorch {torch.__version__} is built for CUDA 13.0, " in (
        error.what
    )
    assert f"which needs driver 580 or newer; {has} (The NVIDIA driver on" in error.what
    assert error.fix.startswith(fix) and error.fix.endswith("computes on the CPU")


@pytest.mark.parametrize("field", ["target.dtype", "train.compute_dtype", "evaluate.dtype"])
def test_every_number_format_of_a_run_is_looked_at(
    field: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    give_gpu(monkeypatch, (7, 5))
    computing(monkeypatch, None)
    formats = {"target.dtype": "float32", "train.compute_dtype": "float32"} | {field: "bfloat16"}
    sets = [part for pair in formats.items() for part in ("--set", "=".join(pair))]
    with pytest.raises(SystemExit) as end:
        door.main(lambda: door.app(["devices", "demo", *sets]))
    assert end.value.code == 2 and "has no bfloat16" in capsys.readouterr().err


def test_a_gpu_without_bfloat16_is_refused_for_it_and_taken_for_float32(
    monkeypatch: pytest.MonkeyPatch,
):
    give_gpu(monkeypatch, (7, 5))
    computing(monkeypatch, None)
    error = refused(dtype="bfloat16")
    assert error.what.startswith("Tesla T4 (compute capability 7.5) has no bfloat16")
    assert "train.compute_dtype" in error.where and "float32" in error.fix
    assert choose_device("auto", dtype="float32") == torch.device("cuda", 0)


def test_a_gpu_that_the_build_has_no_kernels_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    give_gpu(monkeypatch, (12, 0))
    computing(monkeypatch, RuntimeError("CUDA error: no kernel image is available for execution"))
    error = refused()
    assert isinstance(error, ConfigError)
    assert "which has kernels for sm_80 sm_90: CUDA error: no kernel image" in error.what


def test_a_gpu_in_other_hands_may_be_free_later(monkeypatch: pytest.MonkeyPatch):
    give_gpu(monkeypatch, (9, 0))
    computing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"))
    error = refused()
    assert isinstance(error, TransientError) and "CUDA out of memory" in error.what


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Two parts of a divided GPU were two ranks, and the second met `invalid device ordinal`."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    give_gpu(monkeypatch, (9, 0))
    computing(monkeypatch, None)
    assert choose_device("auto", dtype="bfloat16", index=0) == torch.device("cuda", 0)
    error = refused(index=1)
    assert error.what == (
        "a process for GPU #1, but CUDA shows 1 of CUDA_VISIBLE_DEVICES=MIG-a,MIG-b"
    )


def test_nonsense_is_refused_even_where_cuda_shows_a_part_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,first")
    give_gpu(monkeypatch, (9, 0))
    assert "'first' is the name of no GPU" in refused().what


def test_on_the_cpu_no_setting_of_gpus_matters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "nonsense")
    assert choose_device("cpu", dtype="bfloat16").type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no backends written in Python",
)
@pytest.mark.parametrize("head", ["other:1", "other:0"], ids=["own", "with the embedding"])
def test_a_target_over_two_gpus_mixes_no_devices(head: str):
    """Its taps stayed on the devices of their layers, and could not be joined."""
    command = [sys.executable, "-m", "tests.target.spread_target", head]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_target_is_spread_over_as_many_gpus_as_are_set(monkeypatch: pytest.MonkeyPatch):
    give_gpu(monkeypatch, (9, 0), count=3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 * (gpu + 1), 5000))
    gpu = torch.device("cuda", 0)
    assert placement(gpu, 1) == {"device_map": {"": gpu}}
    assert placement(gpu, 2) == {"device_map": "auto", "max_memory": {0: 800, 1: 1600}}
    with pytest.raises(ConfigError, match="a target on 4 GPUs, but CUDA shows 3"):
        placement(gpu, 4)
    cpu = torch.device("cpu")
    assert placement(cpu, 4) == {"device_map": {"": cpu}}


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_target_that_does_not_fit_its_gpus_is_not_left_on_the_host(place: str):
    model = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": place})
    with pytest.raises(ConfigError, match="weights do not fit 2 GPUs"):
        check_placement(model, 2)
    check_placement(SimpleNamespace(hf_device_map={"": 0, "lm_head": 1}), 2)
