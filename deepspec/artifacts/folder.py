"""A folder of a store, whose files are named relative to it."""

import shutil
from pathlib import Path

from deepspec.storage.store import Store


class StoreFolder:
    """Files below one folder; a name that leads out of it is refused."""

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder
        self.url = f"{store.url.rstrip('/')}/{folder}"

    def path(self, relative: str) -> str:
        """The name in the store of a file of this folder."""
        self.store.path(relative)  # refuses a way out of the folder before the prefix hides it
        return f"{self.folder}/{relative}"

    def read(self, relative: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none of this name.
        """
        return self.store.read(self.path(relative))

    def write(self, relative: str, data: bytes) -> None:
        """Replace a file's content at once or not at all."""
        self.store.write(self.path(relative), data)

    def remove(self, relative: str) -> None:
        """Neither a file nor a folder of this name is left."""
        self.store.remove(self.path(relative))

    def names(self, relative: str) -> list[str]:
        """What lies directly in a folder now, files and folders, sorted."""
        return self.store.names(self.path(relative))

    def put_file(self, local: Path, relative: str) -> None:
        """Copy one more file into the folder."""
        with self.store.staged() as staged:
            shutil.copyfile(local, staged)
            self.store.publish(staged, self.path(relative))
