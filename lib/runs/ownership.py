"""The owner of a run's folder: the one process that writes there."""

import contextlib
import fcntl
import itertools
import os
import socket
import weakref
from pathlib import Path
from typing import BinaryIO

from lib.errors import InputError

LOCK = "run.lock"


def own(folder: Path) -> BinaryIO | None:
    """Make this process the owner of ``folder`` until the returned file is closed.

    The folder is created if absent. The file, run.lock, names the owner and stays there. Its lock
    is a flock, which the system releases when the process ends, however it ends.

    On NFS, Linux passes a flock to the server, so that it holds between machines. If a machine
    fails, the server keeps its locks until their lease ends (NFSv4: 90 seconds by default). With
    the mount options nolock or local_lock, the lock holds within one machine only.

    Returns:
        The locked file; None on a file system without locks.

    Raises:
        InputError: another process owns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Neither truncated nor written before it is locked: it may name the present owner.
    file = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115  (open for the whole run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise InputError(
            f"{folder} is in use by {owner}: wait until that run ends, or start one elsewhere"
        ) from None
    except OSError:
        file.close()
        return None
    # A fork shares the lock: loading processes could hold it for seconds after the owner's death.
    weak = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (inherited := weak()) and inherited.close())
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def new_folder(path: Path) -> Path:
    """Create and return ``path``; or PATH-2, PATH-3, ... if that exists."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
