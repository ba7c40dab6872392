"""A file is whole or absent, whatever happens to its writer; a lock keeps other processes out."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

from m2d.errors import DataError
from m2d.files.atomic import cache_file, clear_leftovers, is_locked, try_lock, whole_file, whole_records, write_whole


def fail_midway(path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("power cut")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(RuntimeError):
        fail_midway(path)
    assert [(child.name, child.read_bytes()) for child in tmp_path.iterdir()] == [("file", b"old")]


def fail_on_a_full_disk(path: Path) -> None:
    with cache_file(path):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)[^\n]*$"):
        fail_on_a_full_disk(tmp_path / "new" / "shard")


@pytest.mark.parametrize("durable", [False, True])
def test_the_file_is_hidden_until_it_is_whole_and_follows_the_umask(tmp_path: Path, durable: bool) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file", durable=durable) as partial:
            partial.write_text("all of it")
            assert [child.name.startswith(".") for child in tmp_path.iterdir()] == [True]
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_the_mode_is_the_umasks_whoever_writes(tmp_path: Path) -> None:
    """safetensors and tempfile make files for their user alone."""
    with whole_file(tmp_path / "file") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = list[tuple[str, bool]]()

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "other", "quick", durable=False)
    write_whole(tmp_path / "file", "all of it")
    (file, named), folder = synced
    assert file.startswith(".file.")
    assert not named
    assert folder == (tmp_path.name, True)


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")  # CIFS, FUSE

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "file", "all of it")
    assert (tmp_path / "file").read_text() == "all of it"


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_knows_no_locks_this_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusal: int
) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path, real = tmp_path / "mount" / "lock", fcntl.flock

    def flock(file: IO[str], kind: int) -> None:
        if Path(file.name).parent == path.parent:
            raise OSError(refusal, os.strerror(refusal))
        real(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not is_locked(path)
    lock = try_lock(path)
    assert lock is not None
    with lock:
        assert is_locked(path)
        assert try_lock(path) is None
    assert not is_locked(path)
    assert [record.message for record in caplog.records] == [
        f"{path.parent}: its file system knows no locks, so a run on another machine is not noticed"
    ]


def test_leftovers_of_a_kill_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "shard", b"whole")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".shard.host.17.1.partial").write_bytes(b"half")
    assert clear_leftovers(tmp_path) == 1
    assert sorted(child.name for child in tmp_path.rglob("*")) == ["a", "shard"]


def test_one_process_holds_a_lock_until_it_closes_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ask = "import sys, pathlib; from m2d.files import atomic; sys.exit(not atomic.try_lock(pathlib.Path(sys.argv[1])))"
    asked = [sys.executable, "-c", ask, str(path)]
    assert not is_locked(path)
    assert not path.exists()
    lock = try_lock(path)
    assert lock is not None
    with lock:
        assert is_locked(path)
        assert try_lock(path) is None
        assert subprocess.run(asked, check=False).returncode == 1
    assert not is_locked(path)
    assert subprocess.run(asked, check=False).returncode == 0


def test_of_a_garbled_file_of_metrics_the_whole_records_are_read() -> None:
    content = b'{"step": 1}\n' + b"\xff\xfe\0" * 9 + b'\n5\n{"loss": 2.0}\n{"step": 2}\n{"step": 3, "ti'
    assert whole_records(content) == [{"step": 1}, {"step": 2}]
