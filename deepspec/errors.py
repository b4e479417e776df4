"""Every error a user can meet: what happened, where, and how to go on.

One base class; `transient` is True only where the same call may succeed later without any change.
An error crosses the border between processes as one JSON event and an exit code (`__main__`),
and is raised again on the other side (`process.launch`).
"""

from typing import Any, ClassVar

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_TRANSIENT = 75  # EX_TEMPFAIL of sysexits.h: "try again"


class DeepSpecError(Exception):
    """What went wrong (`what`), in which file, field or shard (`where`), and how to `fix` it."""

    exit_code: ClassVar[int] = EXIT_FAILED
    kinds: ClassVar[dict[str, type["DeepSpecError"]]] = {}
    """Every kind of error by its name, for `error_from_json`."""

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.__name__] = cls

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        failures: dict[int, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        # the shards that are missing because of it, each with its own error
        self.failures = failures or {}

    @property
    def transient(self) -> bool:
        """Whether the same call may succeed later."""
        return self.exit_code == EXIT_TRANSIENT

    def __str__(self) -> str:
        more = {"where": self.where, "fix": self.fix}
        lines = [self.what, *(f"{name}: {text}" for name, text in more.items() if text)]
        return "\n  ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The error as data, from which `error_from_json` makes it again."""
        failures = {str(shard): failure for shard, failure in self.failures.items()}
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
            "transient": self.transient,
            **({"failures": failures} if failures else {}),
        }


class UserError(DeepSpecError):
    """The request itself cannot be carried out as given; found before expensive work starts."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A recipe, key or value that is not allowed."""


class DataError(UserError):
    """An input file or row that cannot be read as what it should be."""


class TargetNotFound(DataError):
    """No target, or no tokenizer, of that name can be loaded here."""


class StoreError(UserError):
    """The artifact store cannot be used: not writable, too small, no such bucket, wrong keys."""


class ArtifactMismatch(UserError):
    """An artifact, record or draft was made by something other than the current run describes."""


class FidelityTooLow(UserError):
    """A lossy codec would change the hidden states more than the limits allow."""


class DamagedData(DeepSpecError):
    """Stored bytes do not match their record."""


class TransientError(DeepSpecError):
    """The same call may succeed later: a busy server, a lost connection, a worker that died."""

    exit_code = EXIT_TRANSIENT


class ChildFailed(DeepSpecError):
    """A child process ended without reporting an error."""


class TrainingFailed(DeepSpecError):
    """Training stopped because the rest would be wasted: a loss that is not finite, no samples."""


class OutOfMemory(DeepSpecError):
    """One piece of work, the smallest there is, that does not fit into memory."""


class ShardsFailed(DeepSpecError):
    """Some shards of a stage were not committed; all others were."""

    @property
    def transient(self) -> bool:
        """Whether any shard may be committed by another try."""
        return bool(self.retryable)

    @property
    def retryable(self) -> list[int]:
        """The shards whose own failure is transient."""
        return sorted(shard for shard, failure in self.failures.items() if failure.get("transient"))


def error_from_json(fields: dict[str, Any]) -> DeepSpecError:
    """The error that a child process reported, as the same class again.

    One of a class unknown here is a TransientError or a ChildFailed.
    """
    unknown = TransientError if fields.get("transient") else ChildFailed
    kind = DeepSpecError.kinds.get(fields.get("error", ""), unknown)
    failures = {int(shard): failure for shard, failure in fields.get("failures", {}).items()}
    where, fix = fields.get("where", ""), fields.get("fix", "")
    return kind(fields["what"], where=where, fix=fix, failures=failures)
