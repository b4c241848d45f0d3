"""unpack.py: files come back; hostile and damaged archives are refused, and leave nothing."""

import io
import os
import stat
import struct
import tarfile
import zipfile
from contextlib import nullcontext

import pytest

from unpack import main

GOOD = {"a.txt": b"first", "room/b.txt": b"second" * 1000, "room/deep/c.txt": b""}
KINDS = ["zip", "tar", "tar.gz"]


def tar_file(name, content=b"x", kind=tarfile.REGTYPE, link="", size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(content) if size is None else size
    return info, content


def zip_file(name, content=b"x", mode=0):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info, content


def packed(path, *entries):
    """An archive of the entries, in the format that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for info, content in entries:
                archive.writestr(info, content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return path


def good(path):
    make = zip_file if path.suffix == ".zip" else tar_file
    return packed(path, *(make(name, content) for name, content in GOOD.items()))


@pytest.fixture
def refused(tmp_path, capsys):
    """``refused(archive)``: the one line with which it is refused; nothing is left or written."""

    def run(archive, gigabytes="1"):
        before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert main([str(archive), str(tmp_path / "inside" / "new"), gigabytes]) == 2
        (tmp_path / "inside").rmdir()  # and empty
        assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith(f"unpack.py: {archive} ")
        assert captured.out == ""
        return line

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back(tmp_path, kind):
    archive, folder = good(tmp_path / f"good.{kind}"), tmp_path / "new"
    assert main([str(archive), str(folder), "1"]) == 0
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == GOOD
    assert not any(p.stat().st_mode & (stat.S_ISUID | stat.S_IXUSR) for p in folder.rglob("*.txt"))


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    assert main([str(good(tmp_path / "good.zip")), str(tmp_path / "new"), "1"]) == 2
    assert "File exists" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


NAMES = ["/abs", "../up", "a/../../up", "a/..", "\\abs", "..\\up", "C:\\x", "C:x", "//host/x"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_leave_the_folder(tmp_path, refused, kind, name):
    make = zip_file if kind == "zip" else tar_file
    archive = packed(tmp_path / f"bad.{kind}", make("first.txt"), make(name))
    assert "holds a path that leaves the folder" in refused(archive)


OTHERS = {
    "symbolic link": (tarfile.SYMTYPE, stat.S_IFLNK),
    "hard link": (tarfile.LNKTYPE, None),
    "fifo": (tarfile.FIFOTYPE, stat.S_IFIFO),
    "device": (tarfile.CHRTYPE, stat.S_IFCHR),
    "block device": (tarfile.BLKTYPE, stat.S_IFBLK),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_what_is_no_file(tmp_path, refused, kind, other):
    of_tar, of_zip = OTHERS[other]
    if kind == "tar":
        bad = tar_file("x", b"", of_tar, link="first.txt")
        archive = packed(tmp_path / "bad.tar", tar_file("first.txt"), bad)
    elif of_zip is None:
        pytest.skip("zip has no hard links")
    else:
        archive = packed(tmp_path / "bad.zip", zip_file("x", b"/etc/passwd", of_zip | 0o777))
    assert "which is no file (a link or a device)" in refused(archive)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_link_and_a_file_behind_it(tmp_path, refused, kind):
    """A folder that is a link to elsewhere, then a file in that folder."""
    (tmp_path / "elsewhere").mkdir()
    place = str(tmp_path / "elsewhere")
    if kind == "tar":
        entries = tar_file("room", b"", tarfile.SYMTYPE, place), tar_file("room/x")
    else:
        entries = zip_file("room", place.encode(), 0o120777), zip_file("room/x")
    assert "which is no file" in refused(packed(tmp_path / f"bad.{kind}", *entries))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_two_entries_of_one_name(tmp_path, refused, kind):
    make = zip_file if kind == "zip" else tar_file
    with pytest.warns(UserWarning, match="Duplicate") if kind == "zip" else nullcontext():
        archive = packed(tmp_path / f"bad.{kind}", make("x"), make("x", b"other"))
    assert "holds two entries of one name: 'x'" in refused(archive)


@pytest.mark.parametrize("kind", KINDS)
def test_archives_that_unfold_into_more(tmp_path, refused, kind):
    make = zip_file if kind == "zip" else tar_file
    archive = packed(tmp_path / f"bomb.{kind}", make("x", bytes(3_000_000)))
    assert "unfolds into more than it should" in refused(archive, "0.002")


def test_a_zip_whose_directory_lies_about_the_size(tmp_path, refused):
    archive = packed(tmp_path / "bomb.zip", zip_file("x", bytes(3_000_000)))
    data = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):  # the size after unpacking
        struct.pack_into("<I", data, data.index(signature) + at, 10)
    archive.write_bytes(data)
    assert "is damaged" in refused(archive)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_archives_that_are_cut_off(tmp_path, refused, kind, share):
    archive = tmp_path / f"cut.{kind}"
    make = zip_file if kind == "zip" else tar_file
    packed(archive, *(make(f"{i}.txt", os.urandom(3000)) for i in range(10)))
    content = archive.read_bytes()
    if kind == "tar":  # its end is 10 KiB of zeros
        content = content.rstrip(b"\0")
    archive.write_bytes(content[: int(share * len(content))])
    assert "is damaged" in refused(archive)


def test_a_tar_that_is_cut_off_between_two_files(tmp_path, refused):
    archive = packed(tmp_path / "cut.tar", tar_file("a"), tar_file("b"))
    archive.write_bytes(archive.read_bytes()[:1024])
    assert "is damaged (it is cut off)" in refused(archive)


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", bytes(2000), b"PK\3\4"])
def test_other_files(tmp_path, refused, content):
    (tmp_path / "page.zip").write_bytes(content)
    assert "is damaged" in refused(tmp_path / "page.zip")


@pytest.mark.parametrize("more", [[], ["new", "one"], ["new", "nan"], ["new", "1e400"]])
def test_usage(capsys, more):
    assert main(["archive", *more]) == 2
    usage = "usage: unpack.py ARCHIVE FOLDER GIGABYTES (a number)\n"
    assert capsys.readouterr().err == usage
