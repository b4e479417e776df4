"""What this machine has for a process: GPUs and their driver, a compiler, ports on loopback.

CUDA is not loaded, nor is PyTorch: what they can use of it is `deepspec.target.device`'s to find.
"""

import os
import re
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from deepspec.errors import ConfigError

LOOPBACK = "127.0.0.1"
MIG = "MIG-"  # what the name of a part of a GPU begins with
SMI_S = 10.0  # nvidia-smi hangs where a GPU has failed
# the oldest driver that runs programs built for a major version of CUDA
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
ENDS_LIST = re.compile(r"-\d+|none|nodevfiles", re.IGNORECASE)
GPU_NAME = re.compile(rf"(\d+)|(GPU-|{MIG})[\w/-]+")
LISTED_GPU = re.compile(r"GPU (\d+): .*\(UUID: (GPU-[\w-]+)\)")
LISTED_PART = re.compile(rf"\s+MIG .*\(UUID: ({MIG}[\w/-]+)\)")
DRIVER = re.compile(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b")


def visible_gpus() -> list[str]:
    """The GPUs that a process here may use, by names that `CUDA_VISIBLE_DEVICES` takes.

    A GPU that is divided (MIG) counts by its parts, of which CUDA shows a process only one.

    Raises:
        ConfigError: as `named_gpus`.
    """
    named = named_gpus()
    return gpus_of_machine() if named is None else named


def group_gpus(gpus: Sequence[str], gpus_per_lane: int) -> list[str]:
    """These GPUs as values of `CUDA_VISIBLE_DEVICES`, of `gpus_per_lane` GPUs each.

    Raises:
        ConfigError: some would be left over, or they are parts of divided GPUs.
    """
    check_divides(gpus_per_lane, len(gpus), "GPUs")
    if gpus_per_lane > 1 and any(gpu.startswith(MIG) for gpu in gpus):
        raise ConfigError(
            "CUDA shows a process one part of a divided GPU (MIG), and no two of them",
            where="resources.devices.gpus_per_lane",
            fix="set it to 1, or use whole GPUs",
        )
    return [",".join(gpus[i : i + gpus_per_lane]) for i in range(0, len(gpus), gpus_per_lane)]


def check_divides(gpus_per_lane: int, num_gpus: int, what: str) -> None:
    """Refuse lanes of this many GPUs where some GPUs would be left over.

    Raises:
        ConfigError: names the numbers that divide.
    """
    if num_gpus % gpus_per_lane == 0:
        return
    fitting = [str(size) for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    raise ConfigError(
        f"{num_gpus} {what} cannot be dealt to lanes of {gpus_per_lane}",
        where="resources.devices.gpus_per_lane",
        fix=f"set it to {' or '.join(fitting)}, or choose other GPUs (CUDA_VISIBLE_DEVICES)",
    )


def named_gpus() -> list[str] | None:
    """The GPUs in `CUDA_VISIBLE_DEVICES`: none where it hides them all, None where it is not set.

    Raises:
        ConfigError: CUDA would leave out some of what it names, without a word.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    named, kinds = list[str](), set[str | None]()
    for name in map(str.strip, value.rstrip(", ").split(",")):
        if ENDS_LIST.fullmatch(name) or not value.strip(", "):
            break  # as CUDA has it: what follows is hidden
        match = GPU_NAME.fullmatch(name)
        if match is None:
            raise _bad_name(f"{name!r} is the name of no GPU", value)
        number, kind = match.groups()
        named.append(str(int(number)) if number else name)
        kinds.add(kind)
    if len(set(named)) < len(named):
        raise _bad_name("it names a GPU twice, and CUDA then shows none", value)
    if len(kinds) > 1:
        raise _bad_name("it mixes numbers, GPU- and MIG- names, and CUDA reads one kind", value)
    return named


def _bad_name(what: str, value: str) -> ConfigError:
    return ConfigError(
        f"CUDA_VISIBLE_DEVICES is {value!r}: {what}",
        where="CUDA_VISIBLE_DEVICES",
        fix="unset it, or set it to numbers or names that `nvidia-smi -L` lists, such as 0,1; "
        "an empty value hides every GPU",
    )


def gpus_of_machine() -> list[str]:
    """The GPUs that the driver lists; where it lists none, those with a file in /dev."""
    gpus, divided = dict[str, str](), dict[str, list[str]]()
    for line in _nvidia_smi("-L").splitlines():
        if gpu := LISTED_GPU.match(line):
            gpus[gpu[2]] = gpu[1]
        elif (part := LISTED_PART.match(line)) and gpus:
            divided.setdefault(list(gpus)[-1], []).append(part[1])
    if divided:
        return [name for uuid in gpus for name in divided.get(uuid, [uuid])]
    return list(gpus.values()) or [
        str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))
    ]


def driver_version() -> str | None:
    """The version of NVIDIA's driver, such as 570.86.15; None where there is none to be found."""
    kernel = Path("/proc/driver/nvidia/version")
    found = DRIVER.search(kernel.read_text() if kernel.exists() else "")
    found = found or DRIVER.search(
        _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    )
    return found[1] if found else None


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; nothing where it is missing, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        child = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        output, _ = child.communicate(timeout=SMI_S)
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        child.kill()  # and not waited for: stuck in the driver it cannot even die
        return ""
    return "" if child.returncode else output


def missing_for_triton() -> list[str]:
    """What Triton needs to compile its kernels' launchers, and does not find here."""
    compilers = [os.environ.get("CC") or "gcc", "clang"]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    found = {
        "a C compiler (gcc)": any(map(shutil.which, compilers)),
        f"Python's headers ({header})": header.exists(),
    }
    return [name for name, is_there in found.items() if not is_there]


def missing_compiler(*, on_gpu: bool) -> list[str]:
    """What PyTorch needs to compile for this machine's GPU or CPU, and does not find here."""
    if on_gpu:
        return missing_for_triton()
    is_there = shutil.which(os.environ.get("CXX", "g++"))
    return [] if is_there else ["a C++ compiler (g++)"]


def free_port() -> int:
    """A port of `LOOPBACK` on which no process listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_loopback(url: str) -> bool:
    """Whether the URL leads to this machine, which no proxy does."""
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
