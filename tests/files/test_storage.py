from pathlib import Path

import pytest
from pyarrow import fs

from m2d.errors import ConfigError, DataError
from m2d.files.storage import open_storage


def test_a_local_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    filesystem, path = open_storage("folder/file.txt")
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert (path, open_storage("~/data")[1]) == (str(tmp_path / "folder" / "file.txt"), str(tmp_path / "data"))


def test_a_file_uri_and_its_path_are_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "a file.txt").write_bytes(b"here")
    filesystem, path = open_storage((tmp_path / "a file.txt").as_uri())
    assert path == str(tmp_path / "a file.txt")
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"here"


@pytest.mark.parametrize("location", ["/data/ISIC/", "file:///data/ISIC/"])
def test_a_trailing_slash_makes_no_difference(location: str) -> None:
    assert open_storage(location)[1] == "/data/ISIC"


def test_a_bucket_is_reached_through_its_own_filesystem() -> None:
    """No byte is sent: constructing the filesystem needs no network when the endpoint is given."""
    filesystem, path = open_storage("s3://bucket/ISIC/?endpoint_override=localhost:1&region=x&scheme=http")
    assert filesystem.type_name == "s3"
    assert path == "bucket/ISIC"


@pytest.mark.parametrize("location", ["ftp://host/data", "file://", "https://host/data", ""])
def test_an_unreachable_location_is_one_line(location: str) -> None:
    with pytest.raises(DataError, match=r"^storage: .*give a local path or a URI[^\n]*$"):
        open_storage(location)


def test_a_uri_with_a_key_is_refused_whoever_asks() -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        open_storage("nothing://AKIA123:hush@bucket/data?token=hush")
    assert "hush" not in str(caught.value)
