"""Memory of a container is that of its control group, and not that of its host."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from deepspec.model import memory
from deepspec.process import host_memory as module
from deepspec.process.host_memory import HostMemory, host_memory

GB = 10**9
V1 = "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V2 = "24 19 0:21 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
OTHER = "31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"


@pytest.fixture(autouse=True)
def large_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    host = SimpleNamespace(total=512 * GB, available=400 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)


def make_proc(root: Path, mount: str, membership: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/\n{membership}\n")
    (root / "proc/self/mountinfo").write_text(f"{OTHER}\n{mount}\n")


def make_group(folder: Path, kind: str, limit: int | str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first, second = {
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "v2": ("memory.max", "memory.current"),
    }[kind]
    prefix = "total_" if kind == "v1" else ""
    (folder / first).write_text(f"{limit}\n")
    (folder / second).write_text(f"{used}\n")
    stat = f"anon 1\n{prefix}inactive_file {cached - 5}\n{prefix}active_file 5\n"
    (folder / "memory.stat").write_text(stat)


PLACES = {"v1": "sys/fs/cgroup/memory", "v2": "sys/fs/cgroup"}
MOUNTS = {"v1": V1, "v2": V2}
MEMBERS = {"v1": "4:hugetlb,memory:{}", "v2": "0::{}"}
UNLIMITED: dict[str, int | str] = {"v1": 9223372036854771712, "v2": "max"}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    ("shown", "path"), [("/", "/"), ("/docker/abc", "/docker/abc"), ("/", "/docker/abc")]
)
def test_a_container_of_16_gb_on_a_host_of_512_has_16(tmp_path: Path, kind: str, shown, path):
    """Seen from within a namespace of its own, by its path on the host, and from the host."""
    make_proc(tmp_path, MOUNTS[kind].format(shown=shown), MEMBERS[kind].format(path))
    place = tmp_path / PLACES[kind]
    own = place if shown == path else place / "docker/abc"
    make_group(own, kind, 16 * GB, used=7 * GB, cached=3 * GB)
    assert host_memory() == HostMemory(16 * GB, 12 * GB)


@pytest.mark.parametrize("kind", PLACES)
def test_the_limit_of_a_group_above_holds_too(tmp_path: Path, kind: str):
    """As a Kubernetes pod limits all of its containers together."""
    make_proc(tmp_path, MOUNTS[kind].format(shown="/"), MEMBERS[kind].format("/pod/one"))
    pod = tmp_path / PLACES[kind] / "pod"
    make_group(pod / "one", kind, UNLIMITED[kind], used=GB, cached=10)
    make_group(pod, kind, 20 * GB, used=19 * GB, cached=10)
    assert host_memory() == HostMemory(20 * GB, GB + 10)
    make_group(pod / "one", kind, 8 * GB, used=GB, cached=10)
    assert host_memory() == HostMemory(8 * GB, GB + 10)


@pytest.mark.parametrize("kind", PLACES)
def test_without_a_limit_it_is_the_hosts(tmp_path: Path, kind: str):
    assert host_memory() == HostMemory(512 * GB, 400 * GB), "not Linux"
    make_proc(tmp_path, MOUNTS[kind].format(shown="/"), MEMBERS[kind].format("/a"))
    assert host_memory() == HostMemory(512 * GB, 400 * GB), "a root group has no files"
    make_group(tmp_path / PLACES[kind] / "a", kind, UNLIMITED[kind], used=GB, cached=10)
    assert host_memory() == HostMemory(512 * GB, 400 * GB)


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path):
    make_proc(tmp_path, V2.format(shown="/"), "0::/")
    make_group(tmp_path / PLACES["v2"], "v2", GB, used=2 * GB, cached=10)
    assert host_memory().available == 0


def test_work_on_a_cpu_is_planned_with_the_containers_memory(tmp_path: Path):
    make_proc(tmp_path, V2.format(shown="/"), "0::/")
    make_group(tmp_path / PLACES["v2"], "v2", 16 * GB, used=4 * GB, cached=10)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 12 * GB + 10
    assert memory.usable_bytes(cpu) == (12 * GB + 10) // 2
