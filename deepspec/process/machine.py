"""What this machine has for a process: GPUs, found without loading CUDA, and ports on loopback."""

import os
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"


def visible_gpus() -> list[str]:
    """The GPUs by their names in `CUDA_VISIBLE_DEVICES`; none where it hides them all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device.strip()]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def free_port() -> int:
    """A port of `LOOPBACK` on which no process listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
