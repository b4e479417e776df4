"""The GPUs that tests compile for: what a driver reports of them."""

from typing import NamedTuple

READY = "the pretence works"  # a child's first line: from here on a failure is the project's own


class Chip(NamedTuple):
    """One NVIDIA chip."""

    name: str
    capability: tuple[int, int]
    shared_memory: int  # bytes that one block may have (`shared_memory_per_block_optin`)


CHIPS = {
    "sm_80": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 166_912),
    "sm_86": Chip("NVIDIA A10", (8, 6), 101_376),
    "sm_89": Chip("NVIDIA L4", (8, 9), 101_376),
    "sm_90": Chip("NVIDIA H100 80GB HBM3", (9, 0), 232_448),
    "sm_100": Chip("NVIDIA B200", (10, 0), 232_448),
    "sm_120": Chip("NVIDIA GeForce RTX 5090", (12, 0), 101_376),
}
