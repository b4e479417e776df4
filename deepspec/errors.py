"""Every error a user can meet: what happened, where, and how to go on.

One base class; ``transient`` is True only where the same call may succeed later without any change.
The process border (`launch`, `__main__`) carries an error as one JSON line and an exit code, and
raises it again on the other side.
"""

from __future__ import annotations

from typing import Any, ClassVar

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_TRANSIENT = 75  # EX_TEMPFAIL of sysexits.h: "try again"


class DeepSpecError(Exception):
    """What went wrong (`what`), in which file, field or shard (`where`), and what to do about
    it (`fix`).
    """

    transient: ClassVar[bool] = False
    exit_code: ClassVar[int] = EXIT_FAILED

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        # the shards that are missing because of it, each with its own error
        self.failures: dict[int, dict[str, Any]] = {}

    def __str__(self) -> str:
        parts = [
            self.what,
            f"where: {self.where}" if self.where else "",
            f"fix: {self.fix}" if self.fix else "",
        ]
        return "\n  ".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DeepSpecError:
        return cls(fields["what"], where=fields.get("where", ""), fix=fields.get("fix", ""))


class UserError(DeepSpecError):
    """The request itself cannot be carried out as given; found before expensive work starts."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A recipe, key or value that is not allowed."""


class DataError(UserError):
    """An input file or row that cannot be read as what it should be."""


class StoreError(UserError):
    """The artifact store cannot be used: not writable, too small, no such bucket, wrong keys."""


class ArtifactMismatch(UserError):
    """An artifact, record or draft was made by something other than what is asked for now."""


class FidelityTooLow(UserError):
    """A lossy codec would change the hidden states more than the limits allow."""


class DamagedData(DeepSpecError):
    """Stored bytes differ from what their record says."""


class TransientError(DeepSpecError):
    """The same call may succeed later: a busy server, a lost connection, a worker that died."""

    transient = True
    exit_code = EXIT_TRANSIENT


class ChildFailed(DeepSpecError):
    """A child process ended without saying why."""


class TrainingFailed(DeepSpecError):
    """Training stopped because going on would waste the run (a loss that is not finite, nothing
    to learn from).
    """


class ShardsFailed(DeepSpecError):
    """Some shards of a stage were not committed; all others were. Worth trying again if any
    failure is transient.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        failures: dict[int, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.failures = failures or {}

    @property
    def retryable(self) -> list[int]:
        return sorted(shard for shard, failure in self.failures.items() if failure.get("transient"))

    def to_json(self) -> dict[str, Any]:
        return {
            **super().to_json(),
            "failures": {str(shard): failure for shard, failure in self.failures.items()},
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ShardsFailed:
        failures = {int(shard): failure for shard, failure in fields.get("failures", {}).items()}
        return cls(
            fields["what"],
            where=fields.get("where", ""),
            fix=fields.get("fix", ""),
            failures=failures,
        )


def error_from_json(fields: dict[str, Any]) -> DeepSpecError:
    """The error that a child process reported, as the same class again (a ChildFailed for a
    class unknown here).
    """
    known = {cls.__name__: cls for cls in _subclasses(DeepSpecError)}
    return known.get(fields.get("error", ""), ChildFailed).from_json(fields)


def _subclasses(cls: type[DeepSpecError]) -> list[type[DeepSpecError]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]
