"""Places from which clients may load adapters: directories and hub ids that the operator named."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from chameleon_jax.checkpoints.peft import WEIGHTS_FILE
from chameleon_jax.checkpoints.peft_config import CONFIG_FILE, AdapterError, read_config
from chameleon_jax.checks import require

MAX_SOURCE_LEN = 4096
"""Characters of an adapter's path or hub id."""


def check_readable(adapters: Mapping[str, str]) -> None:
    """Check that directories which the operator named have adapters. Raises ValueError with the first that has none.

    Args:
        adapters: `name -> directory`.
    """
    for name, path in adapters.items():
        try:
            read_config(Path(path))
        except (OSError, AdapterError) as error:
            raise ValueError(f"adapter {name!r}, {path}: {error}") from error


class AdapterSources:
    """Allowed sources of adapters.

    Args:
        directories: See `ServerConfig.adapter_dirs`.
        hub_ids: See `ServerConfig.hub_adapters`.

    Raises:
        ValueError: A directory does not exist.
    """

    def __init__(self, directories: Sequence[str], hub_ids: Sequence[str]):
        for directory in directories:
            require(Path(directory).is_dir(), "adapter_dir", directory, "a directory")
        self._roots = [Path(directory).resolve(strict=True) for directory in directories]
        self._hub_ids = frozenset(hub_ids)

    def found(self) -> dict[str, Path]:
        """List the adapters directly inside the directories by name, the first of each name. Raises ValueError."""
        adapters: dict[str, Path] = {}
        for root in self._roots:
            try:
                directories = sorted(root.iterdir())
            except OSError as error:
                raise ValueError(f"adapter_dir is {str(root)!r}, which cannot be listed: {error}") from error
            for directory in directories:
                if _may_be_adapter(directory):
                    adapters.setdefault(directory.name, directory)
        return adapters

    def find(self, name: str) -> Path | None:
        """Find the directory of an adapter that a request names; None where there is none. May download it.

        A name is a hub id, or a path relative to one of the directories. A path has one spelling, without ".." for example, as
        each name is an adapter of its own. Raises ValueError where the download fails.
        """
        if name in self._hub_ids:
            return download(name)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            return None
        with contextlib.suppress(ValueError):
            return self.resolve(name)
        return None

    def resolve(self, source: str) -> Path:
        """Find the directory of an adapter that a client named. May download it.

        The directory and both files must lie below an allowed directory after symbolic links are followed.

        Args:
            source: Hub id, or a path, absolute or relative to one of the directories.

        Raises:
            ValueError: The source is not allowed or no adapter. The message reveals nothing else about the disk.
        """
        if source in self._hub_ids:
            return download(source)
        refused = ValueError(
            f"source {reprlib.repr(source)} is not an adapter that may be loaded; allowed: directories with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} below one of the server's adapter directories ({len(self._roots)}), "
            f"and {len(self._hub_ids)} hub ids"
        )
        if not source or len(source) > MAX_SOURCE_LEN or not source.isprintable():
            raise refused
        for root in self._roots:
            try:
                directory = (root / source).resolve(strict=True)
                files = [(directory / name).resolve(strict=True) for name in (CONFIG_FILE, WEIGHTS_FILE)]
                are_files = all(file.is_file() for file in files)
            except (OSError, RuntimeError, ValueError):  # missing, unreadable, a loop of links, or no valid path
                continue
            if are_files and all(path.is_relative_to(root) for path in (directory, *files)):
                return directory
        raise refused


def _may_be_adapter(directory: Path) -> bool:
    """Whether it is an adapter, or cannot be read: loading then fails, and the log names it."""
    try:
        return (directory / CONFIG_FILE).is_file()
    except OSError:
        return True


def download(hub_id: str) -> Path:
    """Download the two files of an adapter, or take them from the cache, and return their directory. Raises ValueError.

    Args:
        hub_id: `owner/repository`, or `owner/repository/subfolder` for one of a repository's adapters.
    """
    import huggingface_hub

    owner, _, rest = hub_id.partition("/")
    repository, _, subfolder = rest.partition("/")
    files = [str(PurePosixPath(subfolder, file)) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        root = huggingface_hub.snapshot_download("/".join(filter(None, (owner, repository))), allow_patterns=files)
        return Path(root, subfolder)
    except Exception as error:  # the library documents no narrower type
        raise ValueError(f"adapter {hub_id!r} cannot be downloaded: {error}") from error
