"""Checkpoints on disk: all that a run needs to go on exactly, as safetensors and JSON alone.

A checkpoint's record is written last. `checkpointing` decides when one is saved and which is best.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.artifacts.artifact import Artifact
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.model.checkpoint import save_draft
from deepspec.model.drafter import Drafter
from deepspec.storage.store import file_checksum, pretty_json
from deepspec.train.strategy import Strategy

# The newest one, and one to fall back on should it turn out damaged; the best one is kept as well.
KEEP = 2


class CheckpointRecord(BaseModel):
    """`record.json` of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    step: int
    files: dict[str, str] = {}
    """Checksum of each file of the checkpoint."""
    loss: float = 0.0
    acceptance_length: float | None = None
    """Over held-out samples; None where it was not measured."""
    since_best: int = 0
    """Measured checkpoints in a row, this one included, no better than one before them."""
    inputs: dict[str, str] = {}
    """Manifest digests of what it was trained on, by `stage/fingerprint`."""

    @property
    def folder(self) -> str:
        """Where its files are in the artifact."""
        return f"checkpoints/{self.step:08d}"


def save_checkpoint(
    artifact: Artifact, strategy: Strategy, *, draft: Drafter, record: CheckpointRecord
) -> None:
    """Write the state after `record.step` optimizer steps, on all ranks, and then its record.

    The first rank writes the draft, as whole as any reader wants it; each rank writes its share of
    the optimizer's state, dealt out by whole parameters. Of 2 billion trained parameters in float32
    the draft takes 8 GB (embedding and lm_head come on top) in the first rank's host memory and
    scratch folder, the state 16 GB: 250 MB of it on each of 64 ranks, which write at the same time.
    A parameter is put together on all ranks, one after the other, so that on top of their own
    shares they hold one whole parameter; under `deepspeed` also `draft`, 8 GB on each device until
    it is saved.
    """
    world = strategy.world
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch)
        share = f"optimizer-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"
        save_file(optimizer_share(strategy), local / share)
        if world.is_first:
            save_draft(draft, local)
        files = {path.name: file_checksum(path) for path in sorted(local.iterdir())}
        for name in files:
            artifact.put_file(local / name, f"{record.folder}/{name}")
    shares = world.gather(files)  # once a rank has all of them, all files are there
    if world.is_first:
        whole = {name: checksum for each in shares for name, checksum in each.items()}
        put_record(artifact, record.model_copy(update={"files": whole}))
        records = checkpoint_records(artifact)
        best = best_checkpoint(records)
        for old in list(records.values())[:-KEEP]:
            if old is not best:
                artifact.remove(old.folder)


def optimizer_share(strategy: Strategy) -> dict[str, Tensor]:
    """The rank's share of the optimizer's state, in host memory, ready for safetensors."""
    world = strategy.world
    loads = [0] * world.size
    share: dict[str, Tensor] = {}
    for name, size in strategy.sizes.items():
        owner = loads.index(min(loads))
        loads[owner] += size
        for key, tensor in strategy.optimizer_state(name):
            if owner == world.rank:
                share[f"{name}:{key}"] = tensor.cpu().contiguous()
    return share


def put_record(artifact: Artifact, record: CheckpointRecord) -> None:
    """Write a checkpoint's record."""
    artifact.write(f"{record.folder}/record.json", pretty_json(record.model_dump()))


def checkpoint_records(artifact: Artifact) -> dict[int, CheckpointRecord]:
    """All complete checkpoints by step, ascending."""
    names = artifact.names("checkpoints")
    paths = [artifact.path(f"checkpoints/{name}/record.json") for name in names if name.isdigit()]
    written = [data for data in artifact.store.read_many(paths) if data is not None]
    records = [CheckpointRecord.model_validate_json(data) for data in written]
    return {record.step: record for record in records}


def best_checkpoint(records: Mapping[int, CheckpointRecord]) -> CheckpointRecord | None:
    """The one with the longest acceptance, of equal ones the latest; None if none was measured.

    Not the one with the lowest loss (trap D9).
    """
    measured = [record for record in records.values() if record.acceptance_length is not None]
    return max(measured, key=lambda best: (best.acceptance_length, best.step), default=None)


def resume_draft(
    artifact: Artifact, draft: Drafter, inputs: Mapping[str, str]
) -> CheckpointRecord | None:
    """Load the newest complete checkpoint's weights into the draft; None if there is none.

    Raises:
        ArtifactMismatch: it was trained on another version of one of the `inputs`, of which a shard
            was made again since.
        DamagedData: its bytes are not those that were saved.
    """
    records = checkpoint_records(artifact)
    if not records:
        return None
    record = records[max(records)]
    # Training may resume from another source, which names other inputs: those that both name must
    # be the same.
    changed = [name for name, digest in record.inputs.items() if inputs.get(name, digest) != digest]
    if changed:
        raise ArtifactMismatch(
            f"the checkpoint of step {record.step} was trained on another version of "
            f"{', '.join(changed)}, which was made again since",
            where=artifact.url,
            fix="remove the folder 'checkpoints' there to train anew",
        )
    file = whole_file(artifact, record, "model.safetensors")
    draft.load_state_dict(
        load_file(file), strict=True
    )  # from the host: on a GPU it may not fit twice
    return record


def resume_optimizer(artifact: Artifact, record: CheckpointRecord, strategy: Strategy) -> None:
    """Load a checkpoint's optimizer state, whatever number of ranks and strategy saved it.

    Every rank reads all of the files, tensor by tensor (from a bucket: each fetches them, unless
    they are in its scratch folder already).

    Raises:
        DamagedData: the bytes are not those that were saved.
    """
    for name in record.files:
        if name.startswith("optimizer"):
            with safe_open(whole_file(artifact, record, name), framework="pt") as file:
                for full_name in file.keys():  # noqa: SIM118 - it is no mapping
                    parameter, _, key = full_name.rpartition(":")
                    strategy.restore(parameter, key, file.get_tensor(full_name))


def whole_file(artifact: Artifact, record: CheckpointRecord, name: str) -> Path:
    """A local copy of one of a checkpoint's files.

    Raises:
        DamagedData: its bytes are not those that were saved.
    """
    local = artifact.store.fetch(artifact.path(f"{record.folder}/{name}"))
    if file_checksum(local) != record.files[name]:
        what = f"the checkpoint's {name} is damaged"
        fix = "remove that folder to go on from the checkpoint before it"
        raise DamagedData(what, where=f"{artifact.url}/{record.folder}", fix=fix)
    return local
