"""The checkpoints of a training: when they are measured, which is best, when to stop early."""

import logging

from deepspec.model.drafter import Drafter
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
    """The checkpoints so far, and how far held-out answers were accepted at each.

    All ranks call each method together.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        settings, source = trainer.settings, trainer.data.source
        self.numbers = acceptance_numbers(source.index, settings.acceptance_samples)
        self.records = checkpoint_records(trainer.artifact)
        if settings.acceptance_samples and not self.numbers:
            log.warning(
                "stage=train there is no held-out sample to measure checkpoints on: "
                "the last one is kept, train.patience has no effect"
            )

    def is_regular(self, step: int) -> bool:
        """Whether there is a checkpoint after so many steps on any machine."""
        return step % self.trainer.settings.checkpoint_steps == 0

    def measure_resumed(self, step: int) -> dict[str, float]:
        """Measure the checkpoint that training resumes from, if there was no time before.

        Only those at a multiple of `train.checkpoint_steps` count. Returns what was measured.
        """
        record = self.records.get(step)
        if not (self.numbers and self.is_regular(step) and record):
            return {}
        if record.acceptance_length is not None:
            return {}
        del self.records[step]
        measured = self._measured(record, self.trainer.strategy.whole())
        self.records[step] = measured
        if self.trainer.world.is_first:
            put_record(self.trainer.artifact, measured)
        return _numbers(measured)

    def save(self, step: int, result: StepResult) -> dict[str, float]:
        """Measure and save; returns what was measured.

        One that is saved by time or before a stop is not measured, unless it is the last: how far
        the machine came by then must change no result.
        """
        trainer = self.trainer
        draft = trainer.strategy.whole()
        record = CheckpointRecord(
            step=step, loss=result.loss, since_best=self._newest().since_best, inputs=trainer.inputs
        )
        is_last = step == trainer.data.total_steps
        if is_last or (self.is_regular(step) and not result.stop):
            record = self._measured(record, draft)
        save_checkpoint(trainer.artifact, trainer.strategy, draft=draft, record=record)
        log.info(
            "stage=train step=%d loss=%.4f held_out_acceptance_length=%s checkpoint saved",
            step,
            result.loss,
            record.acceptance_length,
        )
        self.records[step] = record
        return _numbers(record)

    def no_better(self) -> bool:
        """Whether the last `train.patience` checkpoints were all worse than one before them."""
        patience = self.trainer.settings.patience
        return patience is not None and self._newest().since_best >= patience

    def _newest(self) -> CheckpointRecord:
        return self.records[max(self.records)] if self.records else CheckpointRecord(step=0)

    def _measured(self, record: CheckpointRecord, draft: Drafter) -> CheckpointRecord:
        """The record with the acceptance of the draft as it is now."""
        if not self.numbers:
            return record
        trainer = self.trainer
        accepted = held_out_acceptance(draft, trainer.data.source, self.numbers, trainer.world)
        best = best_checkpoint(self.records)
        since_best = 0
        if best and best.acceptance_length is not None and accepted < best.acceptance_length:
            since_best = self._newest().since_best + 1
            if record.loss < best.loss:
                log.warning(
                    "stage=train step=%d: the loss falls (%.4f to %.4f) and so does held-out "
                    "acceptance (%.3f to %.3f); step %d stays the best",
                    record.step,
                    best.loss,
                    record.loss,
                    best.acceptance_length,
                    accepted,
                    best.step,
                )
        return record.model_copy(update={"acceptance_length": accepted, "since_best": since_best})


def _numbers(record: CheckpointRecord) -> dict[str, float]:
    """The measured acceptance as metrics; none where it was not measured."""
    if record.acceptance_length is None:
        return {}
    return {"held_out_acceptance_length": round(record.acceptance_length, 4)}
