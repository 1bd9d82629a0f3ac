"""Compiled programs, kept between processes and calls in one folder, and packed into archives that travel.

JAX keeps a file for each program, and XLA in a subfolder one for each choice that it measured. Archives come from elsewhere and
are not trusted: names are plain and match a pattern, sizes are bounded, links are refused, nothing is unpickled. A program is
machine code all the same: take along only archives that a machine of yours wrote.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

LIVE = Path(".cache/device-programs")
"""The folder, under the current directory."""
AUTOTUNED = "xla_gpu_per_fusion_autotune_cache_dir"
"""Subfolder in which XLA keeps its measured choices."""
MAX_ARCHIVES = 4
ARCHIVE_BYTES = 12 << 20
"""Limit of one archive. Four of them travel with the repository in 64 MiB."""
ENTRY_OVERHEAD = 128
"""Bytes of an entry beside its content and twice its name, and bytes of the archive's end."""
MAX_ENTRIES = 20_000
ENTRY_NAME = re.compile(rf"(?:{AUTOTUNED}/)?[A-Za-z0-9_=+-][A-Za-z0-9._=+-]{{0,199}}")
ARCHIVE_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}-programs-[0-9]\.zip")


def environment(folder: Path) -> dict[str, str]:
    """Environment variables with which JAX keeps every program in `folder`."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def entries(folder: Path) -> dict[str, int]:
    """Bytes of each file that may be packed, by name: programs, and measured choices."""
    found = {}
    for prefix, place in (("", folder), (f"{AUTOTUNED}/", folder / AUTOTUNED)):
        for file in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
            if ENTRY_NAME.fullmatch(prefix + file.name) and file.is_file() and not file.is_symlink():
                found[prefix + file.name] = file.stat().st_size
    return found


def pack(folder: Path, out: Path, name: str, before: Iterable[str] = ()) -> tuple[int, int]:
    """Write `NAME-programs-1.zip` and on, each complete in itself, and replace archives of an earlier pack.

    Measured choices come first, then programs, the smallest first: they take about as long to compile as large ones. Entries
    from before the call come last, as an earlier call packed them.

    Returns:
        The number of entries packed, and of entries for which there was no room.
    """
    sizes, old = entries(folder), set(before)
    order = sorted(sizes, key=lambda entry: (not entry.startswith(AUTOTUNED), entry in old, sizes[entry], entry))
    places: list[list[str]] = [[] for _ in range(MAX_ARCHIVES)]
    room = [ARCHIVE_BYTES - ENTRY_OVERHEAD] * MAX_ARCHIVES
    for entry in order:
        need = sizes[entry] + 2 * len(entry) + ENTRY_OVERHEAD
        place = next((i for i in range(MAX_ARCHIVES) if room[i] >= need), None)
        if place is not None:
            places[place].append(entry)
            room[place] -= need
    for i, chosen in enumerate(places, 1):
        file = out / f"{name}-programs-{i}.zip"
        if chosen:
            _write(file, folder, chosen, sizes)
        else:
            file.unlink(missing_ok=True)
    packed = sum(len(chosen) for chosen in places)
    return packed, len(sizes) - packed


def _write(file: Path, folder: Path, chosen: list[str], sizes: dict[str, int]) -> None:
    partial = file.with_suffix(".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # programs are compressed already
            for entry in chosen:
                content = (folder / entry).read_bytes()
                if len(content) == sizes[entry]:  # otherwise a process that was killed is still writing it
                    archive.writestr(entry, content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def forget_since(folder: Path, since: float) -> None:
    """Remove entries written since `since` (`time.time()`): a killed process may have left half of one."""
    for entry in entries(folder):
        with contextlib.suppress(FileNotFoundError):
            if (folder / entry).stat().st_mtime >= since:
                (folder / entry).unlink()


def archives(folder: Path) -> list[Path]:
    """Files named as archives; none if the folder is missing."""
    return sorted(file for file in folder.iterdir() if ARCHIVE_NAME.fullmatch(file.name)) if folder.is_dir() else []


def unpack(folder: Path, earlier: Path) -> int:
    """Copy programs that `folder` lacks out of the archives in `earlier`, and return their number.

    An archive that `pack` cannot have written is ignored as a whole, with a line on the error output.
    """
    count = 0
    for file in archives(earlier):
        try:
            contents = _read(file)
        except Exception as error:  # zipfile raises many kinds for bytes that are no archive
            print(f"{file} is ignored: {error}", file=sys.stderr, flush=True)
            continue
        count += sum(_place(folder / name, content) for name, content in contents.items())
    return count


def _read(file: Path) -> dict[str, bytes]:
    """Read everything in an archive.

    Raises:
        ValueError: The file or an entry cannot be `pack`'s.
    """
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > ARCHIVE_BYTES:
        raise ValueError(f"it has {status.st_size} bytes; at most {ARCHIVE_BYTES} are allowed")
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if len(infos) > MAX_ENTRIES:
            raise ValueError(f"it has {len(infos)} entries; at most {MAX_ENTRIES} are allowed")
        for info in infos:
            if not ENTRY_NAME.fullmatch(info.filename):
                raise ValueError(f"the name {info.filename[:100]!r} is not allowed")
            if stat.S_ISLNK(info.external_attr >> 16) or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename[:100]!r} is a link or compressed")
        if sum(info.file_size for info in infos) > ARCHIVE_BYTES:
            raise ValueError(f"its entries have more than {ARCHIVE_BYTES} bytes")
        return {info.filename: archive.read(info) for info in infos}


def _place(path: Path, content: bytes) -> bool:
    """Write a file, at once or not at all, and return whether it is new."""
    if path.parent.is_symlink() or os.path.lexists(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    with os.fdopen(os.open(partial, flags, 0o644), "wb") as out:
        out.write(content)
    os.replace(partial, path)
    return True
