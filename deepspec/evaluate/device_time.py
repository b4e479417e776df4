"""The time at which a device has finished its work, as speeds are measured by it."""

import time

import torch


def device_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, read once all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
