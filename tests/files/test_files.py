"""Files and folders: whole or not at all, ours or left alone, with the modes of the umask."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from retain.errors import OutputError
from retain.files import (
    clear_scratch,
    file_digest,
    locked,
    recover,
    remove_ours,
    whole_file,
    whole_files,
    whole_folder,
    why_unwritable,
    writing,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [
    FULL, OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EROFS, "Read-only file system"), OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
], ids=str)  # fmt: skip
def test_each_library_s_word_for_a_full_disk_is_one_line(error: Exception, tmp_path: Path) -> None:
    for place in (whole_file(tmp_path / "a", "it"), whole_folder(tmp_path / "b", "it"),
                  writing("it", tmp_path)):  # fmt: skip
        with pytest.raises(OutputError, match="it cannot be written; got: ") as caught, place:
            raise error
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_torch_s_own_words_for_a_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises((RuntimeError, OSError)) as caught:
        torch.save(torch.zeros(100_000), "/dev/full")
    assert why_unwritable(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("No space left"), RuntimeError("CUDA error"), KeyError()]
)
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), writing("it", tmp_path):
        raise error


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_modes_are_those_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "a.json", "it") as scratch:
            scratch.touch(mode=0o600)
        with whole_folder(tmp_path / "adapter", "it") as new:
            (new / "w.safetensors").touch(mode=0o600)
    finally:
        os.umask(before)
    for path, whole in ((tmp_path / "a.json", 0o666), (tmp_path / "adapter", 0o777),
                        (tmp_path / "adapter" / "w.safetensors", 0o666)):  # fmt: skip
        assert path.stat().st_mode & 0o777 == whole & ~mask, path


def test_others_files_in_a_folder_stay(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "deep").mkdir(parents=True)
    for name in ("notes.txt", "deep/more.bin", "old.safetensors", "new.json"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to("notes.txt")
    inode = (folder / "notes.txt").stat().st_ino
    (folder / ".README.md.retain-a_killed").mkdir()  # which is nobody's
    with whole_folder(folder, "it", ("*.safetensors", "new.json")) as new:
        (new / "new.json").write_text("new")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert names == ["deep", "deep/more.bin", "link", "new.json", "notes.txt"]
    assert (folder / "new.json").read_text() == "new"
    assert (folder / "notes.txt").stat().st_ino == inode
    assert (folder / "link").is_symlink()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_there_is_added_to(tmp_path: Path) -> None:
    """What others write meanwhile stays, and so do modes; a kill leaves no two halves."""
    folder = tmp_path / "out"
    folder.mkdir(mode=0o700)
    for name in ("config", "weights"):
        (folder / name).write_text("old")
        (folder / name).chmod(0o640)
    inode = folder.stat().st_ino
    with pytest.raises(KeyError), whole_files(folder, "it", last="config"):
        raise KeyError
    with whole_files(folder, "it", last="config") as new:
        for name in ("config", "weights", "more"):
            (new / name).write_text("new")
        (folder / "checkpoint-100").mkdir()
        (folder / "checkpoint-100" / "log").write_text("theirs")
    assert folder.stat().st_ino == inode and folder.stat().st_mode & 0o777 == 0o700
    assert {p.name for p in folder.iterdir()} == {"config", "weights", "more", "checkpoint-100"}
    for name in ("config", "weights"):
        assert (folder / name).read_text() == "new"
        assert (folder / name).stat().st_mode & 0o777 == 0o640
    assert (folder / "checkpoint-100" / "log").read_text() == "theirs"


def test_halves_of_two_sets_are_never_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("old")
    (tmp_path / "weights").write_text("old")
    seen, replace = [], os.replace

    def watched(old: Path, new: Path) -> None:
        replace(old, new)
        seen.append({p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()})

    monkeypatch.setattr(os, "replace", watched)
    with whole_files(tmp_path, "it", last="config") as new:
        (new / "config").write_text("new")
        (new / "weights").write_text("new")
    assert seen == [{"weights": "new"}, {"weights": "new", "config": "new"}]


def test_a_file_is_no_folder_to_replace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputError, match="not a folder"), whole_folder(tmp_path / "a", "it"):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    (tmp_path / "a").touch(mode=0o600)
    with whole_file(tmp_path / "a", "it") as scratch:
        scratch.write_text("new")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_stays_a_link(kind: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "out"
    link.symlink_to(disk / "real")
    if kind == "file":
        (disk / "real").touch()
        with whole_file(link, "it") as scratch:
            scratch.write_text("new")
    else:
        (disk / "real").mkdir()
        with whole_folder(link, "it") as new:
            (new / "a").write_text("new")
    assert link.is_symlink() and (disk / "real").exists() and not (disk / "real").is_symlink()
    assert sorted(p.name for p in disk.iterdir()) == ["real"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".adapter.retain-a1b2c3d_" / "old"
    left.mkdir(parents=True)
    (left / "weights").write_text("older")
    recover(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == "older"


def test_what_killed_writers_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    ours = [".a.json.retain-a1b2c3d_/half"]
    theirs = [".a.json-settings/a.json", ".a.json-cautions/mine", ".a.json-cache/a.json",
              ".a.json.retain-notes/a.json", ".b.json.retain-a1b2c3d_/b.json"]  # fmt: skip
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clear_scratch(tmp_path / "a.json")
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(theirs)


def test_only_ours_is_removed(tmp_path: Path) -> None:
    for name in ("a.pt", "rng_state_1.pth", "notes.txt"):
        (tmp_path / "c" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "c" / name).touch()
    remove_ours(tmp_path / "c", ("a.pt", "rng_state*.pth"))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["notes.txt"]
    remove_ours(tmp_path / "c", ("*",))
    assert not (tmp_path / "c").exists()


class TestLock:
    @pytest.mark.parametrize("file", [False, True])
    def test_one_at_a_time(self, file: bool, tmp_path: Path) -> None:
        place = tmp_path / "deep" / "out"
        with locked(place, file=file):
            with (
                pytest.raises(OutputError, match="another process is writing"),
                locked(place, file=file),
            ):
                raise AssertionError("two at once")
            with locked(tmp_path / "other", file=file):
                pass
        with locked(place, file=file):
            pass
        assert list(tmp_path.iterdir()) == []  # no lock, and no folder made for it, stays

    def test_that_of_a_killed_process_is_free(self, tmp_path: Path) -> None:
        script = (
            "import os, sys, signal; from pathlib import Path; from retain.files import locked\n"
            "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == -9 and (tmp_path / ".retain.lock").exists()
        with locked(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_an_error_inside_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), locked(tmp_path / "a"):
            raise KeyError


def test_a_digest_tells_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "c").write_bytes(b"2")
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
