"""Errors of the operating system as errors of this project."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from deepspec.errors import StoreError, TransientError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def transient_system_errors(where: str) -> Iterator[None]:
    """Within the block a lost connection or a time-out is a TransientError, so that the work is
    tried again; any other error of the system is a StoreError.
    """
    try:
        yield
    except OSError as error:
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ConnectionError | TimeoutError):
            raise TransientError(what, where=where, fix="it is tried again by itself") from error
        raise StoreError(what, where=where, fix="check the disk that holds the store") from error
