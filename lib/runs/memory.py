"""The lack of memory in words, and the return of unused memory to the operating system."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lib.errors import InputError


def out_of_memory(error: BaseException) -> str:
    """What to say of an error if it is a lack of memory, on a GPU or the CPU; else ""."""
    text = str(error)
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    if not isinstance(error, kinds) and "can't allocate memory" not in text:
        return ""
    tried = re.search("tried to allocate ([0-9.]+ [A-Za-z]+)", text, re.IGNORECASE)
    return f"out of memory ({tried[1]} more were needed)" if tried else "out of memory"


@contextmanager
def memory_for(way_out: str) -> Iterator[None]:
    """A context that turns a lack of memory into an InputError with advice."""
    try:
        yield
    except Exception as error:
        if found := out_of_memory(error):
            raise InputError(f"{found}: {way_out}") from error
        raise


def release_free_memory() -> None:
    """Return the free pages of malloc's heap, if the C library supports this (glibc).

    On its own, glibc returns only the end of its heap. Memory of a validation with large batches
    lies below small objects allocated in the meantime, and stays resident: 70 MiB after the first
    validation of a small segmentation model, 115 MiB after five. The call takes milliseconds; the
    system maps the pages again when they are used.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
