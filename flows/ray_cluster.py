"""The Ray cluster of a run: one that exists, or one of this process's own.

Ray is imported late: it reads from the environment where it listens when it is imported, and that
depends on the run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deepspec.config.resources import DevicesConfig, ResourcesConfig
from deepspec.errors import ConfigError, UserError
from deepspec.process.machine import check_divides
from deepspec.process.scopes import GRACE_S

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner

ANSWER_S = 10.0
OBJECTS_BYTES = 100_000_000  # Ray's shared memory: nothing but names goes through it
# Ray's own switch for machines where it is to stay on loopback; its token keeps others out.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


@contextlib.contextmanager
def connected(resources: ResourcesConfig) -> Iterator[RayTaskRunner[Any]]:
    """Prefect's task runner on the run's cluster, or on a Ray of this process's own, on loopback
    and without a dashboard.

    Raises:
        UserError: there is no such cluster.
    """
    address = resources.runner.ray_address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address is None:
        os.environ.update({"RAY_AUTH_TOKEN": secrets.token_hex(32), **ON_LOOPBACK, **os.environ})
        options |= {
            "num_cpus": resources.devices.lanes,
            "include_dashboard": False,
            "object_store_memory": OBJECTS_BYTES,
        }
    with contextlib.ExitStack() as stack:
        try:
            if address is not None:
                check_listening(address)
            from prefect_ray import RayTaskRunner

            with keeping_sigterm():
                runner = stack.enter_context(RayTaskRunner(address or "local", options))
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Ray cannot be {'reached' if address else 'started'}: {error}",
                where=address or "a Ray of this machine",
                fix="resources.runner.ray_address is HOST:PORT on a machine of the cluster "
                "(`ray status` shows it), ray://HOST:10001 from elsewhere",
            ) from None
        yield runner


def check_listening(address: str) -> None:
    """Return where something listens at the address; Ray itself would try for minutes to reach a
    cluster that does not exist.

    Raises:
        OSError: nothing listens there.
        ValueError: the address is no HOST:PORT.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{address!r} names no host and port")
    socket.create_connection((parts.hostname, parts.port), ANSWER_S).close()


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Restores the handler of SIGTERM, which ends the flow in order; Ray's own would end the
    process at once.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def num_gpus(devices: DevicesConfig) -> int:
    """GPUs of the cluster that the stage may use; where there are none it runs on CPUs.

    Raises:
        ConfigError: there are none, and it must not; or lanes of `gpus_per_lane` leave some over.
    """
    resources = imported_ray().cluster_resources()
    found = int(resources.get("GPU", 0)) if devices.type != "cpu" else 0
    if not found and devices.type == "cuda":
        fix = "set resources.devices.type to auto, or add a node with GPUs"
        raise ConfigError("the Ray cluster has no GPU", where="resources.devices.type", fix=fix)
    check_divides(devices.gpus_per_lane, found, "GPUs of the Ray cluster")
    return found


def end_work(work: Any, patience_s: float) -> None:
    """A Ray task's child is ended by its worker; a worker that does not do so in time is ended
    itself, which the child's supervisor notices.
    """
    ray = imported_ray()
    for force in (False, True):
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(work, force=force)
            if ray.wait([work], timeout=GRACE_S + patience_s + 1)[0]:
                return


def imported_ray() -> Any:
    """Ray, which `connected` has imported."""
    import ray

    return ray
