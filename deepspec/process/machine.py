"""The GPUs of this machine as CUDA numbers them, found without loading CUDA."""

from __future__ import annotations

import os
from pathlib import Path


def visible_gpus() -> list[str]:
    """Their names as `CUDA_VISIBLE_DEVICES` knows them; none where it hides them all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device.strip()]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
