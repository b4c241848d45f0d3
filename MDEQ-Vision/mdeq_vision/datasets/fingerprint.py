"""A short text that tells data sets apart."""

import hashlib

from torch.utils.data import Dataset


def fingerprint(dataset: Dataset) -> str:
    """The number of items, and a digest of what ``dataset.contents()`` yields.

    Contents are texts, or arrays of bytes or numbers, in the order of the items: pixels and labels
    where they are in memory, else the names of files and the labels. A data set without that method
    always has the same content.
    """
    digest = hashlib.blake2b(digest_size=6)
    for part in getattr(dataset, "contents", tuple)():
        # A file's name may have bytes that are not UTF-8.
        digest.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
        digest.update(b"\0")
    return f"{len(dataset)} ({digest.hexdigest()})"
