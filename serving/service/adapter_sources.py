"""Which adapters a client may have loaded: those below the directories, and of the hub ids, that the operator named."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path

from chameleon_jax.checkpoints import peft


class AdapterSources:
    """Args: see `ServerConfig.adapter_dirs` and `hub_adapters`. Raises ValueError where a directory is not there."""

    def __init__(self, directories: Sequence[str], hub_ids: Sequence[str]):
        for directory in directories:
            if not Path(directory).is_dir():
                raise ValueError(f"adapter_dir is {directory!r}; allowed: a directory")
        self._roots = [Path(directory).resolve(strict=True) for directory in directories]
        self._hub_ids = frozenset(hub_ids)

    def found(self) -> dict[str, Path]:
        """The adapters directly in the directories, by name. Of two with one name the first counts. Raises ValueError."""
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

    def resolve(self, source: str) -> Path:
        """The directory of an adapter that a client named: a path, absolute or relative to one of the directories, or a hub id.

        A symbolic link counts as what it leads to, of the directory and of each file in it that is read. May download.

        Raises:
            ValueError: it is not one of the allowed, or not an adapter. The text does not say what else is on the disk.
        """
        if source in self._hub_ids:
            return download(source)
        refused = ValueError(
            f"source {reprlib.repr(source)} is not an adapter that may be loaded; allowed: directories with "
            f"{peft.CONFIG_FILE} and {peft.WEIGHTS_FILE} below one of the server's adapter directories ({len(self._roots)}), "
            f"and {len(self._hub_ids)} hub ids"
        )
        if not source or len(source) > 4096 or not source.isprintable():
            raise refused
        for root in self._roots:
            try:
                directory = (root / source).resolve(strict=True)
                files = [(directory / name).resolve(strict=True) for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE)]
                are_files = all(file.is_file() for file in files)
            except (OSError, RuntimeError, ValueError):  # not there, not ours to read, a loop of links, or no path at all
                continue
            if are_files and all(path.is_relative_to(root) for path in (directory, *files)):
                return directory
        raise refused


def _may_be_adapter(directory: Path) -> bool:
    """Whether it is one, or may not be looked into, so that the log names it as left out."""
    try:
        return (directory / peft.CONFIG_FILE).is_file()
    except OSError:
        return True


def download(hub_id: str) -> Path:
    """The two files of a hub repository, from the cache if they are there. Raises ValueError."""
    import huggingface_hub

    try:
        files = [peft.CONFIG_FILE, peft.WEIGHTS_FILE]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # the library documents no narrower type
        raise ValueError(f"adapter {hub_id!r} cannot be downloaded: {error}") from error
