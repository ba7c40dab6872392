"""A file is whole or absent, whatever happens to its writer; a lock keeps other processes out."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from m2d.errors import DataError
from m2d.files.atomic import cache_file, clear_leftovers, is_locked, try_lock, whole_file, write_whole


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
