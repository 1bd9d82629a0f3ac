"""Archives of compiled programs: a round trip within limits, and archives that are not ours."""

from __future__ import annotations

import os
import random
import stat
import zipfile

import pytest

from benchmarks.device import program_cache as cache

CHOICE = f"{cache.AUTOTUNED}/-+choice_1-2=.textproto"


@pytest.fixture
def live(tmp_path):
    """Make a folder as JAX and XLA leave it, with files that a killed process was writing."""
    folder = tmp_path / "live"
    (folder / cache.AUTOTUNED / "tmp").mkdir(parents=True)
    (folder / CHOICE).write_bytes(b"choice")
    (folder / cache.AUTOTUNED / "tmp" / "half").write_bytes(b"h")
    (folder / "jit_fn-1-cache").write_bytes(b"one" * 100)
    (folder / "jit_fn-2-cache").write_bytes(b"two")
    (folder / ".hidden").write_bytes(b"x")
    (folder / "link").symlink_to(folder / "jit_fn-1-cache")
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def archive(out, entries, name="call-1-programs-1.zip", **options):
    with zipfile.ZipFile(out / name, "w", **options) as made:
        for entry, content in entries:
            made.writestr(entry, content)


def test_programs_and_choices_come_back(live, out, tmp_path):
    assert cache.pack(live, out, "call-1") == (3, 0)
    assert [file.name for file in out.iterdir()] == ["call-1-programs-1.zip"]
    new = tmp_path / "new"
    new.mkdir()
    assert cache.unpack(new, out) == 3
    assert files(new) == {name: (live / name).read_bytes() for name in (CHOICE, "jit_fn-1-cache", "jit_fn-2-cache")}
    assert cache.unpack(new, out) == 0


def test_programs_of_the_last_second_are_forgotten(live):
    os.utime(live / "jit_fn-1-cache", (1000.0, 1000.0))
    os.utime(live / CHOICE, (1000.0, 1000.0))
    cache.forget_since(live, 2000.0)
    assert set(cache.entries(live)) == {CHOICE, "jit_fn-1-cache"}


def test_a_program_that_is_there_is_kept(live, out):
    cache.pack(live, out, "call-1")
    (live / "jit_fn-1-cache").write_bytes(b"newer")
    assert cache.unpack(live, out) == 0
    assert (live / "jit_fn-1-cache").read_bytes() == b"newer"


def test_the_most_valuable_come_first_and_archives_stay_small(live, out, monkeypatch):
    monkeypatch.setattr(cache, "ARCHIVE_BYTES", 2000)
    monkeypatch.setattr(cache, "MAX_ARCHIVES", 2)
    for i in range(9):
        (live / f"jit_old-{i}-cache").write_bytes(bytes(10))
        (live / f"jit_new-{i}-cache").write_bytes(bytes(300))
    (live / "jit_large-cache").write_bytes(bytes(2000))
    before = [name for name in cache.entries(live) if "old" in name]
    packed, left_out = cache.pack(live, out, "call-1", before)
    assert packed + left_out == 22 and left_out > 0
    archives = sorted(out.iterdir())
    assert len(archives) == 2 and all(file.stat().st_size <= 2000 for file in archives)
    names = [zipfile.ZipFile(file).namelist() for file in archives]
    assert names[0][0] == CHOICE and names[0][1] == "jit_fn-2-cache"
    assert not any("large" in name for name in names[0] + names[1])
    assert not any("old" in name for name in names[0])


def test_archives_of_an_earlier_pack_are_replaced(live, out):
    (out / "call-1-programs-2.zip").write_bytes(b"old")
    cache.pack(live, out, "call-1")
    assert [file.name for file in out.iterdir()] == ["call-1-programs-1.zip"]


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/tmp/outside",
        "a/b",
        f"{cache.AUTOTUNED}/../../outside",
        f"{cache.AUTOTUNED}/tmp/half",
        "..",
        ".hidden",
        "a\\b",
        "a\nb",
        "x" * 300,
        "Ä-cache",
    ],
)
def test_a_name_that_is_no_plain_file_is_refused(live, out, capsys, name):
    archive(out, [("jit_good-cache", b"good")], "a-programs-1.zip")
    archive(out, [("jit_bad-cache", b"bad"), (name, b"x")])
    before = files(live)
    assert cache.unpack(live, out) == 1
    assert files(live) == before | {"jit_good-cache": b"good"}
    assert capsys.readouterr().err.count("\n") == 1


def broken_link(out):
    info = zipfile.ZipInfo("jit_link-cache")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(out / "call-1-programs-1.zip", "w") as made:
        made.writestr(info, "/etc/passwd")


def broken_symlink(out):
    (out / "real.zip").write_bytes(b"")
    archive(out, [("jit_x-cache", b"x")], "real.zip")
    (out / "call-1-programs-1.zip").symlink_to(out / "real.zip")


def broken_content(out):
    archive(out, [("jit_x-cache", b"content")])
    file = out / "call-1-programs-1.zip"
    file.write_bytes(file.read_bytes().replace(b"content", b"CONTENT"))


BROKEN = {
    "not a zip": lambda out: (out / "call-1-programs-1.zip").write_bytes(b"PK\x03\x04 nonsense"),
    "empty": lambda out: (out / "call-1-programs-1.zip").write_bytes(b""),
    "a folder": lambda out: (out / "call-1-programs-1.zip").mkdir(),
    "a link inside": broken_link,
    "a link itself": broken_symlink,
    "wrong sum": broken_content,
    "a bomb": lambda out: archive(out, [("jit_x-cache", bytes(20 << 20))], compression=zipfile.ZIP_DEFLATED),
    "compressed": lambda out: archive(out, [("jit_x-cache", b"x" * 99)], compression=zipfile.ZIP_DEFLATED),
    "too large": lambda out: archive(out, [("jit_x-cache", bytes(cache.ARCHIVE_BYTES))]),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_archive_is_one_line_and_ignored(live, out, capsys, how):
    BROKEN[how](out)
    before = files(live)
    assert cache.unpack(live, out) == 0
    assert files(live) == before
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "is ignored" in told


def test_nothing_is_written_through_a_link_in_the_folder(live, out, tmp_path):
    archive(out, [("link", b"x"), (f"{cache.AUTOTUNED}/new", b"x")])
    elsewhere = tmp_path / "elsewhere"
    (live / cache.AUTOTUNED).rename(elsewhere)
    (live / cache.AUTOTUNED).symlink_to(elsewhere)
    assert cache.unpack(live, out) == 0
    assert not (elsewhere / "new").exists() and (live / "jit_fn-1-cache").read_bytes() == b"one" * 100


def test_other_files_are_not_looked_at(live, out, capsys):
    (out / "call-1.json").write_text("{}")
    archive(out, [("jit_x-cache", b"x")], "something.zip")
    assert cache.unpack(live, out) == 0 and not capsys.readouterr().err


def test_jax_is_told_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = cache.environment(cache.LIVE)
    assert told["JAX_COMPILATION_CACHE_DIR"] == os.path.join(tmp_path, cache.LIVE)


def test_damaged_archives_are_taken_or_ignored(live, out, tmp_path):
    """Never an error, and never a file of another name."""
    cache.pack(live, out, "call-1")
    file, rng = out / "call-1-programs-1.zip", random.Random(0)
    good, names = file.read_bytes(), set(cache.entries(live))
    for i in range(300):
        damaged = bytearray(good[: rng.choice([len(good), rng.randrange(len(good))])])
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        new = tmp_path / str(i)
        new.mkdir()
        cache.unpack(new, out)
        assert all(cache.ENTRY_NAME.fullmatch(name) for name in files(new)) and len(files(new)) <= len(names)
        assert not list(tmp_path.glob("outside*"))
