"""Memory of the host that this process may use: a container has its own limit (Linux's cgroups)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path("/")  # where `proc` and `sys` are
# files of a group in versions 1 and 2: its limit, what it uses, and the entries of memory.stat that
# are page cache, which gives way to whatever is allocated
FILES = {
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    "cgroup2": ("memory.max", "memory.current", ""),
}
PAGE_CACHE = ("active_file", "inactive_file")


class HostMemory(NamedTuple):
    """Bytes of memory, of the machine or of the container where that has less."""

    total: int
    available: int


def host_memory() -> HostMemory:
    """What this process may use, and what of it nobody uses who shares it."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for group, kind in _groups():
        limit_name, usage_name, prefix = FILES[kind]
        with contextlib.suppress(OSError, ValueError):  # no such file, or the limit is "max"
            limit = int((group / limit_name).read_text())
            lines = map(str.split, (group / "memory.stat").read_text().splitlines())
            stat = {name: int(value) for name, value in lines}
            cached = sum(stat.get(prefix + name, 0) for name in PAGE_CACHE)
            used = int((group / usage_name).read_text()) - cached
            total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total, available)


def _groups() -> Iterator[tuple[Path, str]]:
    """The folders of the control groups that limit this process's memory, each with its kind: the
    process's own and those above it, as far as they are shown here.
    """
    try:
        memberships = (ROOT / "proc/self/cgroup").read_text().splitlines()
        mounts = (ROOT / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    own = dict[str, str]()
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own["cgroup"] = path
        elif number == "0":
            own["cgroup2"] = path
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        kind, _, options = after.split(" ")[:3]
        shown, place = before.split(" ")[3:5]
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # A container may be shown its own group only, under the path that it has on the host.
        relative = own[kind].removeprefix(shown.rstrip("/")).strip("/")
        top = ROOT / place.strip("/")
        folder = top / relative
        yield from ((each, kind) for each in (folder, *folder.parents) if each.is_relative_to(top))
