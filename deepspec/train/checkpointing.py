"""The checkpoints of a training: when they are measured, which is the best, and whether it
still gets better.
"""

from __future__ import annotations

import logging
import time

from deepspec.model.drafter import Drafter
from deepspec.train.batches import StepData
from deepspec.train.checkpoint_files import (
    CheckpointRecord,
    best_checkpoint,
    checkpoint_records,
    put_record,
    save_checkpoint,
)
from deepspec.train.step import StepResult, Trainer
from deepspec.train.validation import acceptance_numbers, held_out_acceptance

log = logging.getLogger(__name__)


class Checkpoints:
    """Which checkpoints there are, how far the draft was accepted at each, and whether it still
    gets better.
    """

    def __init__(self, trainer: Trainer, data: StepData) -> None:
        self.trainer, self.cache, settings = trainer, data.cache, trainer.config.train
        self.numbers = acceptance_numbers(data.cache.index, settings.acceptance_samples)
        self.records = checkpoint_records(trainer.artifact)
        if settings.acceptance_samples and not self.numbers:
            log.warning(
                "stage=train there is no held-out sample to measure checkpoints on: the last one counts, train.patience does nothing"
            )
        self.total, self.every = data.total_steps, settings.checkpoint_steps

    def resumed(self, step: int) -> list[dict[str, float]]:
        """Measure the checkpoint that training goes on from, if it is one of those that count
        and there was no time when it was saved.
        """
        if not (
            self.numbers
            and step % self.every == 0
            and step in self.records
            and self.records[step].acceptance_length is None
        ):
            return []
        self.records[step] = self._measured(self.records.pop(step), self.trainer.strategy.whole())
        if self.trainer.world.is_first:
            put_record(self.trainer.artifact, self.records[step])
        return held_out(self.records[step])

    def save(self, step: int, result: StepResult) -> CheckpointRecord:
        """Measure (unless training is to stop before its end) and save, on all ranks."""
        trainer, draft = self.trainer, self.trainer.strategy.whole()
        record = CheckpointRecord(
            step=step, loss=result.loss, since_best=self._newest().since_best, inputs=trainer.inputs
        )
        if step == self.total or not result.stop:
            record = self._measured(record, draft)
        save_checkpoint(
            trainer.artifact, trainer.strategy, trainer.world, draft=draft, record=record
        )
        if trainer.world.is_first:
            accepted = record.acceptance_length
            log.info(
                "stage=train step=%d loss=%.4f held_out_acceptance_length=%s checkpoint saved",
                step,
                result.loss,
                accepted,
            )
        self.records[step] = record
        return record

    def no_better(self) -> bool:
        """Whether the last `train.patience` checkpoints were all worse than one before them."""
        patience = self.trainer.config.train.patience
        return patience is not None and self._newest().since_best >= patience

    def _newest(self) -> CheckpointRecord:
        return self.records[max(self.records)] if self.records else CheckpointRecord(step=0)

    def _measured(self, record: CheckpointRecord, draft: Drafter) -> CheckpointRecord:
        """The record with the acceptance of the draft as it is now."""
        if not self.numbers:
            return record
        accepted = held_out_acceptance(draft, self.cache, self.numbers, self.trainer.world)
        self._warn_if_worse(record.step, record.loss, accepted)
        best = best_checkpoint(self.records)
        better = best is None or accepted >= (best.acceptance_length or 0.0)
        return record.model_copy(
            update={
                "acceptance_length": accepted,
                "since_best": 0 if better else self._newest().since_best + 1,
            }
        )

    def _warn_if_worse(self, step: int, loss: float, accepted: float) -> None:
        best = best_checkpoint(self.records)
        if (
            best is not None
            and best.acceptance_length is not None
            and accepted < best.acceptance_length
            and loss < best.loss
        ):
            log.warning(
                "stage=train step=%d: the loss falls (%.4f to %.4f) and so does held-out acceptance (%.3f to %.3f); step %d stays the best",
                step,
                best.loss,
                loss,
                best.acceptance_length,
                accepted,
                best.step,
            )


def held_out(record: CheckpointRecord) -> list[dict[str, float]]:
    """The line of metrics that says how far the draft was accepted; none where it was not
    measured.
    """
    if record.acceptance_length is None:
        return []
    return [
        {
            "step": record.step,
            "time": time.time(),
            "held_out_acceptance_length": round(record.acceptance_length, 4),
        }
    ]
