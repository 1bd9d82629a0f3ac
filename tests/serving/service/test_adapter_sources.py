"""Sources that clients may name: none outside of the roots, however it is written or linked."""

from __future__ import annotations

import os
import pathlib

import huggingface_hub
import pytest

from chameleon_jax.serving.service import adapter_sources
from chameleon_jax.serving.service.adapter_sources import AdapterSources
from tests import reference_models as reference

CONFIG = reference.CONFIGS["gqa"]


@pytest.fixture
def root(tmp_path):
    """`root` with adapters a, b and deep/c; `outside`, and links to it."""
    for name in ("root/a", "root/b", "root/deep/c", "outside/secret", "root-2/d"):
        reference.save_adapter(tmp_path / name, CONFIG, 2)
    root = tmp_path / "root"
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    os.symlink(tmp_path / "outside" / "secret", root / "link-out")
    os.symlink(root / "a", root / "link-in")
    os.symlink(root / "loop", root / "loop")
    (root / "half").mkdir()
    os.symlink(tmp_path / "outside" / "secret" / "adapter_config.json", root / "half" / "adapter_config.json")
    os.symlink(root / "a" / "adapter_model.safetensors", root / "half" / "adapter_model.safetensors")
    (root / "whole").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # links, like those of the hub's cache
        os.symlink(root / "a" / name, root / "whole" / name)
    (root / "pipe").mkdir()
    os.symlink(root / "a" / "adapter_config.json", root / "pipe" / "adapter_config.json")
    os.mkfifo(root / "pipe" / "adapter_model.safetensors")
    return root


def test_adapters_below_a_root_are_resolved(root):
    sources = AdapterSources([str(root)], [])
    assert sources.resolve("a") == sources.resolve("link-in") == sources.resolve(str(root / "a")) == root / "a"
    assert sources.resolve("deep/c") == root / "deep" / "c"
    assert sources.resolve("deep/../b") == sources.resolve("./b/") == root / "b"
    assert sources.resolve("whole") == root / "whole"


@pytest.mark.parametrize(
    "source",
    [
        "",
        ".",
        "/",
        "..",
        "../outside/secret",
        "a/../../outside/secret",
        "../root-2/d",
        "link-out",
        "half",
        "loop",
        "empty",
        "file",
        "file/a",
        "pipe",
        "nothing",
        "a\0b",
        "a\nb",
        "~",
        "a" * 5000,
        "x/" * 2000,
        "\ud800",
        "someone/adapter",
        "http://127.0.0.1/a",
    ],
)
def test_other_sources_are_refused(root, source):
    with pytest.raises(ValueError, match="not an adapter that may be loaded") as error:
        AdapterSources([str(root)], ["someone/other"]).resolve(source)
    assert str(root.parent) not in str(error.value)


def test_absolute_paths_outside(root):
    with pytest.raises(ValueError, match="may be loaded"):
        AdapterSources([str(root)], []).resolve(str(root.parent / "outside" / "secret"))
    with pytest.raises(ValueError, match="may be loaded"):
        AdapterSources([], []).resolve(str(root / "a"))


def test_a_root_may_be_a_link(root, tmp_path):
    os.symlink(root, tmp_path / "alias")
    assert AdapterSources([str(tmp_path / "alias")], []).resolve("a") == root / "a"


def test_adapters_directly_in_the_roots_are_found(root):
    other = root.parent / "root-2"
    reference.save_adapter(other / "a", CONFIG, 2)
    found = AdapterSources([str(root), str(other)], []).found()
    assert sorted(found) == ["a", "b", "d", "half", "link-in", "link-out", "pipe", "whole"]  # `resolve` refuses some
    assert found["a"] == root / "a" and found["d"] == other / "d"


def test_directories_that_may_not_be_read_are_found_and_refused(root, monkeypatch):
    is_file = pathlib.Path.is_file

    def denied(path):
        if path.parent.name == "b":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(pathlib.Path, "is_file", denied)
    sources = AdapterSources([str(root)], [])
    assert {"a", "b"} <= sources.found().keys()
    with pytest.raises(ValueError, match="may be loaded"):
        sources.resolve("b")


def test_a_root_must_be_there(root):
    with pytest.raises(ValueError, match="nowhere"):
        AdapterSources([str(root / "nowhere")], [])


def test_hub_ids(root, monkeypatch):
    asked = []
    monkeypatch.setattr(adapter_sources, "download", lambda hub_id: (asked.append(hub_id), root / "a")[1])
    sources = AdapterSources([], ["someone/adapter"])
    assert sources.resolve("someone/adapter") == root / "a" and asked == ["someone/adapter"]
    with pytest.raises(ValueError, match="1 hub ids"):
        sources.resolve("someone/else")
    assert asked == ["someone/adapter"]


@pytest.mark.parametrize(
    ("hub_id", "repository", "folder"),
    [("someone/adapter", "someone/adapter", ""), ("someone/many/deep/c", "someone/many", "deep/c"), ("old", "old", "")],
)
def test_a_subfolder_of_a_hub_repository_is_downloaded_alone(root, monkeypatch, hub_id, repository, folder):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert AdapterSources([], [hub_id]).find(hub_id) == root / folder
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert asked == [(repository, [str(pathlib.PurePosixPath(folder, file)) for file in files])]


def test_a_download_that_fails_is_named(monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="adapter 'someone/many/c' cannot be downloaded: offline"):
        AdapterSources([], ["someone/many/c"]).find("someone/many/c")


def test_a_directory_that_cannot_be_listed_is_named(root):
    sources = AdapterSources([str(root)], [])
    root.rename(root.with_name("elsewhere"))
    with pytest.raises(ValueError, match=f"adapter_dir is '{root}', which cannot be listed: .*No such file"):
        sources.found()
