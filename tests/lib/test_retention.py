"""The last checkpoints of a run: order, kills at any instant, damaged and missing files."""

import errno
import os
import shutil
import signal
import time
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.retention import clean_temporaries, load_newest, save_newest, set_aside, versions


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.pt"


@pytest.fixture(autouse=True)
def folder(path):
    path.parent.mkdir()
    return path.parent


def save_steps(path, steps, keep):
    for step in steps:
        save_newest({"step": step}, path, keep)


def steps(path):
    """The steps of all checkpoints, newest first."""
    return [load(file)["step"] for file in versions(path)]


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def damage(file):
    file.write_bytes(file.read_bytes()[:-30])


def accept(content, source):
    if "step" not in content:
        raise InputError(f"{source} is not a checkpoint of this trainer")


# --- Saving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", range(1, 5))
def test_the_last_ones_are_kept_in_order(path, keep):
    for last in range(6):
        save_newest({"step": last}, path, keep)
        assert steps(path) == list(range(last, max(-1, last - keep), -1))
    older = [f"checkpoint.{number}.pt" for number in range(1, keep)]
    assert names(path) == sorted(["checkpoint.pt", *older])


@pytest.mark.parametrize("keep", [1, 2])
def test_fewer_are_kept_when_asked_to(path, keep):
    save_steps(path, range(5), 4)
    save_newest({"step": 5}, path, keep)
    assert steps(path) == [5, 4][:keep]


def test_more_are_kept_when_asked_to(path):
    save_steps(path, range(3), 2)
    save_steps(path, range(3, 6), 4)
    assert steps(path) == [5, 4, 3, 2]


@pytest.mark.parametrize("keep", [0, -1])
def test_nothing_to_keep_is_a_mistake(path, keep):
    with pytest.raises(ValueError, match=f"keep is {keep}"):
        save_newest({"step": 0}, path, keep)
    assert names(path) == []


def test_file_system_without_links(path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_steps(path, range(5), 3)
    assert steps(path) == [4, 3, 2]
    assert len(names(path)) == 3


def test_other_files_are_left_alone(path):
    others = ["checkpoint.0.pt", "checkpoint.01.pt", "checkpoint.x.pt", "checkpoint.1.pt.bak",
              "xcheckpoint.1.pt", "model.pt", "checkpoint.damaged.2.pt"]  # fmt: skip
    for name in others:
        (path.parent / name).write_bytes(name.encode())
    (path.parent / "checkpoint.7.pt").mkdir()
    save_steps(path, range(4), 2)
    assert steps(path) == [3, 2]
    assert all((path.parent / name).read_bytes() == name.encode() for name in others)
    assert (path.parent / "checkpoint.7.pt").is_dir()


@pytest.mark.parametrize("stage", ["write", "fsync"])
def test_full_disk_leaves_all_files_as_they_were(path, monkeypatch, stage):
    save_steps(path, range(5), 3)
    before = {name: (path.parent / name).stat() for name in names(path)}

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(("torch.save", fail) if stage == "write" else (os, "fsync", fail)))
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint\.pt'"):
        save_newest({"step": 5}, path, 3)
    monkeypatch.undo()
    after = {name: (path.parent / name).stat() for name in names(path)}
    assert {n: (s.st_ino, s.st_mtime_ns) for n, s in before.items()} == {
        n: (s.st_ino, s.st_mtime_ns) for n, s in after.items()
    }


# --- Kills ------------------------------------------------------------------------------------

CALLS = ("fsync", "link", "replace", "unlink")


def killed_save(content, path, keep, at, links=True):
    """Save in a process that dies, as by SIGKILL, before its call number ``at`` that changes
    files; whether it got that far. Without ``links`` the file system has none."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    try:
        count = 0

        def instead_of(call, name):
            def run(*arguments, **options):
                nonlocal count
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                if name == "link" and not links:
                    raise OSError(errno.EPERM, "Operation not permitted")
                return call(*arguments, **options)

            return run

        for name in CALLS:
            setattr(os, name, instead_of(getattr(os, name), name))
        save_newest(content, path, keep)
    finally:
        os._exit(0)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_kill_at_any_instant(path, keep, links):
    """There is always the old or the new one, and no good one is lost to the next saves."""
    for at in range(20):
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        save_steps(path, range(5), keep)
        was_killed = killed_save({"step": 5}, path, keep, at, links)
        content, source = load_newest(path, accept, log=lambda line: None)
        assert content["step"] in (4, 5)
        assert source == path or not links  # with links the newest one's name never vanishes
        before = set(steps(path))
        assert before >= set(range(4, 5 - keep, -1))
        clean_temporaries(path.parent)
        save_newest({"step": 6}, path, keep)
        assert steps(path) == sorted({6, *before}, reverse=True)[:keep]
        assert len(names(path)) == keep
        if not was_killed:
            break
    assert not was_killed  # so that all instants were seen
    assert at > 3


def test_kill_while_saving_without_end(path):
    """The same by the clock, which can also strike amid the write."""
    save_newest({"step": 0}, path, 3)
    for round_ in range(10):
        child = os.fork()
        if not child:
            try:
                for step in range(10**6):
                    save_newest({"step": step, "data": bytes(10**6)}, path, 3)
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.007 * round_)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert steps(path)  # none that is there is damaged
        assert path in versions(path)
    clean_temporaries(path.parent)
    assert set(names(path)) <= {"checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt"}


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 4), st.none() | st.integers(0, 9)), max_size=6))
def test_any_history_of_saves_and_kills(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    save_newest({"step": 0}, path, 2)
    last = 0
    for step, (keep, at) in enumerate(history, start=1):
        if at is None or not killed_save({"step": step}, path, keep, at):
            save_newest({"step": step}, path, keep)
            last = step
            assert len(versions(path)) <= keep
        found = steps(path)
        assert found == sorted(found, reverse=True)
        assert found[0] in (last, step)
        last = found[0]


# --- Reading ----------------------------------------------------------------------------------


def read(path):
    lines = []
    content, source = load_newest(path, accept, lines.append)
    return content["step"], source.name, lines


def test_versions(path):
    assert versions(path) == []
    assert versions(path.parent / "missing" / "checkpoint.pt") == []
    for number in (12, 2, 1):
        save_newest({}, path.with_name(f"checkpoint.{number}.pt"), 1)
    expected = [path.with_name(f"checkpoint.{number}.pt") for number in (1, 2, 12)]
    assert versions(path) == expected
    save_newest({}, path, 20)
    assert versions(str(path)) == [path, *expected]


def test_good_newest_is_used_without_a_word(path):
    save_steps(path, range(3), 3)
    assert read(path) == (2, "checkpoint.pt", [])


def test_damaged_newest(path):
    save_steps(path, range(3), 3)
    damage(path)
    step, source, (line,) = read(path)
    assert (step, source) == (1, "checkpoint.1.pt")
    assert f"{path} is not a readable checkpoint" in line
    assert str(path.with_name(source)) in line
    assert "\n" not in line


def test_two_damaged(path):
    save_steps(path, range(3), 3)
    damage(path)
    damage(path.with_name("checkpoint.1.pt"))
    step, source, (line,) = read(path)
    assert (step, source) == (0, "checkpoint.2.pt")
    assert all(str(path.with_name(f"checkpoint{n}.pt")) in line for n in ("", ".1", ".2"))


def test_newest_of_another_trainer(path):
    save_steps(path, range(2), 3)
    save_newest({"other": 1}, path, 3)
    step, source, (line,) = read(path)
    assert (step, source) == (1, "checkpoint.1.pt")
    assert "not a checkpoint of this trainer" in line


def test_missing_newest(path):
    save_steps(path, range(3), 3)
    path.unlink()
    step, source, (line,) = read(path)
    assert (step, source) == (1, "checkpoint.1.pt")
    assert f"no file {path}" in line


def test_none_is_good(path):
    save_steps(path, range(3), 3)
    for file in versions(path):
        damage(file)
    with pytest.raises(InputError, match=rf"^{path} is not a readable"):
        read(path)
    path.unlink()
    with pytest.raises(InputError, match=rf"^{path.with_name('checkpoint.1.pt')} is not"):
        read(path)


def test_none_is_there(path):
    with pytest.raises(InputError, match=f"^no file {path}"):
        read(path)


def test_permission_is_no_damage(path, monkeypatch):
    """The user can give it; a silent step back would cost a part of the run."""
    save_steps(path, range(3), 3)

    def refuse(source):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr("lib.runs.retention.load", refuse)
    with pytest.raises(PermissionError, match=r"checkpoint\.pt"):
        read(path)


# --- Damaged files set aside ------------------------------------------------------------------


def test_damaged_files_push_no_good_one_out(path):
    save_steps(path, range(3), 3)
    bad = path.read_bytes()[:-30]
    path.write_bytes(bad)
    _, source = load_newest(path, accept, lambda line: None)
    assert set_aside(path, source) == [path.with_name("checkpoint.damaged.pt")]
    assert steps(path) == [1, 0]
    save_newest({"step": 3}, path, 3)
    assert steps(path) == [3, 1, 0]
    assert path.with_name("checkpoint.damaged.pt").read_bytes() == bad


def test_damaged_files_never_overwrite_each_other(path):
    for round_ in range(3):
        save_steps(path, range(3), 3)
        path.write_bytes(b"%d newest" % round_)
        path.with_name("checkpoint.1.pt").write_bytes(b"%d before" % round_)
        _, source = load_newest(path, accept, lambda line: None)
        assert len(set_aside(path, source)) == 2
    found = [file.read_bytes() for file in path.parent.glob("*damaged*")]
    assert sorted(found) == sorted(
        b"%d %s" % (n, which) for n in range(3) for which in (b"newest", b"before")
    )


def test_nothing_to_set_aside(path):
    save_steps(path, range(3), 3)
    before = names(path)
    assert set_aside(path, path) == []
    assert set_aside(path, path.with_name("elsewhere.pt")) == []
    path.unlink()
    assert set_aside(path, path.with_name("checkpoint.1.pt")) == []
    assert names(path) == [name for name in before if name != "checkpoint.pt"]


def test_folder_in_place_of_the_newest(path):
    save_steps(path, range(3), 3)
    path.unlink()
    path.mkdir()
    step, source, (line,) = read(path)
    assert (step, source) == (1, "checkpoint.1.pt")
    assert f"no file {path}" in line
    set_aside(path, path.with_name(source))
    save_newest({"step": 3}, path, 3)
    assert steps(path) == [3, 1, 0]


# --- Temporary files --------------------------------------------------------------------------


def test_only_temporary_files_are_removed(path):
    folder, code = path.parent, uuid.uuid4().hex
    kept = [f"checkpoint.pt.{code}", f".checkpoint.pt.{code[:-1]}", f".checkpoint.pt.{code}0",
            f".checkpoint.pt.{code[:-1]}G", ".hidden", f".{code}", "log.txt"]  # fmt: skip
    for name in [*kept, f".checkpoint.pt.{code}", f".metrics.jsonl.{uuid.uuid4().hex}"]:
        (folder / name).touch()
    (folder / f".folder.{code}").mkdir()
    (folder / f".link.{code}").symlink_to(folder / "log.txt")
    clean_temporaries(folder)
    assert names(path) == sorted([*kept, f".folder.{code}", f".link.{code}"])
    clean_temporaries(folder / "missing")


def test_temporary_file_of_a_killed_write_is_removed(path):
    save_newest({"step": 0}, path, 2)
    assert killed_save({"step": 1}, path, 2, at=0)
    assert len(names(path)) == 2
    clean_temporaries(str(path.parent))
    assert names(path) == ["checkpoint.pt"]
