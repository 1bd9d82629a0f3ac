"""Places from which clients may load adapters: directories, hub ids and URLs that the operator named."""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from chameleon_jax.checkpoints.peft import WEIGHTS_FILE
from chameleon_jax.checkpoints.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterError, read_config
from chameleon_jax.checkpoints.remote_adapter import StoreError, local_directory
from chameleon_jax.checks import require

MAX_SOURCE_LEN = 4096
"""Characters of an adapter's path, hub id or URL."""

SUBFOLDERS = re.compile(r"(/(?!\.+(/|$))[\w.@=+-]+)*")
"""End of a URL behind one that is allowed: plain names, as ".." and escapes could lead out of it."""


def check_readable(adapters: Mapping[str, str]) -> None:
    """Check that directories and URLs which the operator named have adapters. Raises ValueError with the first that has none.

    Args:
        adapters: `name -> directory or URL`.
    """
    for name, path in adapters.items():
        try:
            with local_directory(path, {CONFIG_FILE: MAX_CONFIG_BYTES}) as directory:
                read_config(directory)
        except (OSError, AdapterError) as error:
            raise ValueError(f"adapter {name!r}, {path}: {error}") from error


class AdapterSources:
    """Allowed sources of adapters.

    Args:
        directories: See `ServerConfig.adapter_dirs`.
        hub_ids: See `ServerConfig.hub_adapters`.
        urls: See `ServerConfig.adapter_urls`.

    Raises:
        ValueError: A directory does not exist.
    """

    def __init__(self, directories: Sequence[str], hub_ids: Sequence[str], urls: Sequence[str] = ()):
        for directory in directories:
            require(Path(directory).is_dir(), "adapter_dir", directory, "a directory")
        self._roots = [Path(directory).resolve(strict=True) for directory in directories]
        self._hub_ids = frozenset(hub_ids)
        self._urls = [url.rstrip("/") for url in urls]

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

    def find(self, name: str) -> Path | str | None:
        """Find the directory or URL of an adapter that a request names; None where there is none. May download it.

        A name is a hub id, a URL, or a path relative to one of the directories. A path has one spelling, without ".." for
        example, as each name is an adapter of its own. Raises StoreError where the download fails.
        """
        return download(name) if name in self._hub_ids else self._find(name)

    def allows(self, name: str) -> bool:
        """Whether a request may name an adapter. Asks no hub and no store, so they may have none of that name."""
        return name in self._hub_ids or self._find(name) is not None

    def _find(self, name: str) -> Path | str | None:
        if self._allows_url(name):
            return name
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            return None
        with contextlib.suppress(ValueError):
            return self.resolve(name)
        return None

    def resolve(self, source: str) -> Path | str:
        """Find the directory or URL of an adapter that a client named. May download it.

        The directory and both files must lie below an allowed directory after symbolic links are followed.

        Args:
            source: Hub id, URL, or a path, absolute or relative to one of the directories.

        Raises:
            ValueError: The source is not allowed or no adapter. The message reveals nothing else about the disk.
        """
        if source in self._hub_ids:
            return download(source)
        if self._allows_url(source):
            return source
        refused = ValueError(
            f"source {reprlib.repr(source)} is not an adapter that may be loaded; allowed: directories with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} below one of the server's adapter directories ({len(self._roots)}), "
            f"{len(self._hub_ids)} hub ids, and {len(self._urls)} URLs and the folders below them"
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

    def _allows_url(self, source: str) -> bool:
        return len(source) <= MAX_SOURCE_LEN and any(
            source.startswith(url) and SUBFOLDERS.fullmatch(source, len(url)) is not None for url in self._urls
        )


def _may_be_adapter(directory: Path) -> bool:
    """Whether it is an adapter, or cannot be read: loading then fails, and the log names it."""
    try:
        return (directory / CONFIG_FILE).is_file()
    except OSError:
        return True


def download(hub_id: str) -> Path:
    """Download the two files of an adapter, or take them from the cache, and return their directory. Raises StoreError.

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
        raise StoreError(f"adapter {hub_id!r} cannot be downloaded: {error}") from error
