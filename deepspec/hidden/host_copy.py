"""Bringing captured tensors to the host while the target's next forward passes run."""

import torch

from deepspec.cache.format import EncodedTensor


class HostCopy:
    """Copies tensors from a GPU in a stream of its own; on a CPU there is nothing to copy.

    The stream waits for the states and not for what was started after them. PyTorch keeps the
    pinned memory and uses it again.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(self) -> torch.cuda.Event | None:
        """A mark after the work that the caller has started so far."""
        return torch.cuda.current_stream().record_event() if self.stream else None

    def bring(self, encoded: EncodedTensor, ready: torch.cuda.Event | None) -> EncodedTensor:
        """`encoded` on the host, waited for; called in the background."""
        if self.stream is None or ready is None:
            return encoded
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            parts = tuple(
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(
                    part, non_blocking=True
                )
                for part in encoded.parts
            )
        self.stream.synchronize()
        return encoded._replace(parts=parts)
