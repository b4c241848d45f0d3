"""A run's folder has one owner, until it closes the lock or ends."""

import errno
import fcntl
import os
import signal
import threading

import pytest

from lib.errors import InputError
from lib.runs.run_folder import LOCK, LOG, new_folder, own


def child(action):
    """Fork a process that does ``action`` and then waits; its id, once the action is done."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os.write(done, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return pid


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_owner_is_refused_by_name(tmp_path):
    folder = tmp_path / "runs" / "one"
    lock = own(folder)
    with pytest.raises(InputError) as caught:
        own(folder)
    assert str(caught.value).startswith(f"{folder} is in use by process {os.getpid()} on ")
    lock.close()
    own(folder).close()
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_the_death_of_the_owner_frees_the_folder(tmp_path):
    """By SIGKILL, against which no process can do anything."""
    kept = []
    pid = child(lambda: kept.append(own(tmp_path)))
    with pytest.raises(InputError, match=f"process {pid} on"):
        own(tmp_path)
    end(pid)
    own(tmp_path).close()


def test_a_fork_of_the_owner_does_not_keep_the_folder(tmp_path):
    """A loading process can outlive a trainer that is killed."""
    lock = own(tmp_path)
    pid = child(lambda: None)
    lock.close()
    try:
        own(tmp_path).close()
    finally:
        end(pid)


def test_the_end_of_a_fork_does_not_free_the_folder(tmp_path):
    lock = own(tmp_path)
    end(child(lambda: None))
    with pytest.raises(InputError):
        own(tmp_path)
    lock.close()


@pytest.mark.parametrize("name", [LOCK, LOG])
@pytest.mark.parametrize("exists", [True, False])
def test_nothing_is_written_through_a_link(tmp_path, name, exists):
    """The folder of a run may come from elsewhere."""
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    folder.mkdir()
    (folder / name).symlink_to(other)
    if exists:
        other.write_text("precious")
    with pytest.raises(InputError, match=f"{name} is a link"):
        own(folder)
    assert other.exists() == exists
    assert not exists or other.read_text() == "precious"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert own(tmp_path) is None


def test_new_folders_of_one_name(tmp_path):
    """Made at once: each is another's."""
    found, gate = [], threading.Barrier(8)

    def make():
        gate.wait()
        found.append(new_folder(tmp_path / "runs" / "now"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in found} == {"now", *(f"now-{i}" for i in range(2, 9))}
