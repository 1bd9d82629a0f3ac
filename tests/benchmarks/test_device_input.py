"""Bad input to the device benchmark is one line, and writes nothing."""

from __future__ import annotations

import os

import pytest

from benchmarks.__main__ import main
from benchmarks.device import gpu, supervisor

BAD = {
    "--call 4 --out {new}": "--call is 4; allowed: 1 to 3",
    "--call 0 --out {new}": "--call is 0; allowed: 1 to 3",
    "--call one --out {new}": "Invalid value for '--call'",
    "--call 1": "--out is missing",
    "--sections decode": "--out is missing",
    "--call 1 --out {file}": "--out cannot be made",
    "--call 1 --out {file}/below": "--out cannot be made",
    "--call 1 --out {new} --cache {file}": "which is not a folder",
    "--call 1 --sections decode --out {new}": "exclude each other",
    "--sections decode,nonsense --out {new}": "--sections has nonsense; allowed: smoke",
    "--call 1 --out {new} --budget 1": "--budget is 1; allowed: more than 20 seconds",
    "--call 1 --out {new} --budget nan": "--budget is nan; allowed",
    "--call 1 --out {new} --nonsense": "No such option: --nonsense",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "is_there", lambda: False)
    monkeypatch.setattr(supervisor, "supervise", lambda request: pytest.fail("it was run"))
    paths = {name: tmp_path / name for name in ("file", "new")}
    assert main(["device", *words.format(**paths).split()]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and BAD[words] in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_cache_without_archives_is_a_warning(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(gpu, "is_there", lambda: False)
    monkeypatch.setattr(supervisor, "supervise", lambda request: 7)
    assert main(["device", "--call", "2", "--out", str(tmp_path / "new"), "--cache", str(tmp_path / name)]) == 7
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "has no archives of programs" in told


@pytest.mark.parametrize(("free_mib", "small", "starts"), [(24_000, False, False), (24_000, True, True), (81_000, False, True)])
def test_a_gpu_with_too_little_memory(tmp_path, monkeypatch, capsys, free_mib, small, starts):
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(f'#!/bin/sh\ncase "$*" in *memory.free*) echo {free_mib};; *) echo "NVIDIA X, 1.0";; esac\n')
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(supervisor, "supervise", lambda request: 7)
    code = main(["device", "--call", "1", "--out", str(tmp_path / "new"), *["--small"] * small])
    if starts:
        assert code == 7
        return
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1
    assert "has 23.4 GiB free" in told and "12.6 for weights" in told
    assert not (tmp_path / "new").exists()


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexec sleep 600\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("benchmarks.machine.DRIVER_SECONDS", 0.2)
    monkeypatch.setattr(gpu, "SECONDS", 0.2)
    assert gpu.gpu_name() is None and gpu.free_bytes() is None
