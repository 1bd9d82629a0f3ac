"""Write the sources of `chameleon-jax-client` to a folder: `python clients/python/stage.py FOLDER`, then `pip install FOLDER`.

The package is the client and every module of `chameleon_jax` that it imports, under the name `chameleon_jax_client`.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIENT = "chameleon_jax.serving.client"


def stage(folder: Path) -> list[str]:
    """Write the project. Returns the names of the modules that were copied."""
    shutil.copytree(HERE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", Path(__file__).name))
    names = sorted(_imported(CLIENT, set()))
    for name in names:
        source = _file(name)
        for file in (source, source.with_suffix(".pyi")):
            if file.is_file():
                target = folder / "chameleon_jax_client" / file.relative_to(ROOT / "chameleon_jax")
                target.parent.mkdir(parents=True, exist_ok=True)
                # a dot or a space follows the name of the package in imports, and a slash in the name of the .proto file
                target.write_text(re.sub(r"\bchameleon_jax(?=[. ])", "chameleon_jax_client", file.read_text("utf-8")), "utf-8")
    (folder / "chameleon_jax_client" / "py.typed").touch()
    shutil.copy(ROOT / "LICENSE", folder)
    return names


def _imported(name: str, found: set[str]) -> set[str]:
    """Collect a module, the packages around it, and all that they import from `chameleon_jax`, but for its own root."""
    if name == "chameleon_jax" or name in found:
        return found
    found.add(name)
    for other in (name.rpartition(".")[0], *_imports(ast.parse(_file(name).read_text("utf-8")))):
        _imported(other, found)
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "chameleon_jax":
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if _file(name).is_file() else str(node.module)


def _file(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


if __name__ == "__main__":
    print(f"copied {', '.join(stage(Path(sys.argv[1])))}")
