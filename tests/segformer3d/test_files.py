"""Files appear whole, and nobody's link is written through on the way."""

import os

import pytest

from jobs.picture_files import new_file
from segformer3d.files import replaced_whole, temporary_beside


def write_whole(path):
    with replaced_whole(path) as file:
        file.write(b"mine")


def write_picture(path):
    with new_file(path) as temporary:
        temporary.write_bytes(b"mine")


@pytest.mark.parametrize("write", [write_whole, write_picture])
def test_a_link_that_waits_is_not_written_through(tmp_path, write):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    path = tmp_path / "folder" / "a.png"
    path.parent.mkdir()
    for name in (f".{path.name}.part", f".{path.name}.{os.getpid()}", path.name):
        (path.parent / name).symlink_to(precious)
    write(path)
    assert precious.read_bytes() == b"precious"
    assert path.read_bytes() == b"mine"
    assert not path.is_symlink()
    assert len(list(path.parent.iterdir())) == 3


@pytest.mark.parametrize("write", [write_whole, write_picture])
def test_a_file_has_the_mode_of_any_other(tmp_path, write):
    old = os.umask(0o027)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [write_whole, write_picture])
def test_what_fails_leaves_nothing(tmp_path, write):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    with pytest.raises(Exception, match="directory"):
        write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_name_that_is_taken_is_no_temporary_one(tmp_path, monkeypatch):
    monkeypatch.setattr("uuid.UUID.hex", "0")
    (tmp_path / ".0.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        temporary_beside(tmp_path / "a")
    assert not (tmp_path / "elsewhere").exists()
