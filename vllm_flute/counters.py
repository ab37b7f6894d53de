"""Counters of kernel work: one page of unsigned 64-bit integers that a kernel can add to without a lock.

``page[slot, bucket, field]``: a slot is a kernel (the backends name theirs), a bucket a range of M, a field one
of FIELDS. The page is private memory until `attach` maps a file in its place, so that another process (the API
server) can read what a worker's kernels did. kernels/include/flute.h mirrors the shape.
"""

import numpy as np

SLOTS = 32
M_BUCKETS = ("1", "2-4", "5-8", "9-16", "17-32", "33-128", "129-512", "513+")
_UPPER = (1, 4, 8, 16, 32, 128, 512)
FIELDS = ("calls", "tokens", "bytes")
SHAPE = (SLOTS, len(M_BUCKETS), len(FIELDS))
NBYTES = 8 * SLOTS * len(M_BUCKETS) * len(FIELDS)

page: np.ndarray = np.zeros(SHAPE, dtype=np.uint64)
_on_attach = []  # natives that hold the page's address


def bucket(m: int) -> int:
    """Index into M_BUCKETS of a call with M tokens."""
    return next((i for i, upper in enumerate(_UPPER) if m <= upper), len(_UPPER))


def add(slot: int, m: int, nbytes: int) -> None:
    """Count one call of a kernel written in Python."""
    page[slot, bucket(m)] += np.array([1, m, nbytes], dtype=np.uint64)


def subscribe(set_page) -> None:
    """Let a native library have the page: calls ``set_page(address)`` now and after every attach."""
    _on_attach.append(set_page)
    set_page(page.ctypes.data)


def attach(path) -> None:
    """Move the counters to a file of NBYTES bytes, created or truncated; what was counted stays."""
    global page
    shared = np.memmap(path, dtype=np.uint64, mode="w+", shape=SHAPE)
    shared[:] = page
    page = shared
    for set_page in _on_attach:
        set_page(page.ctypes.data)


def read(path) -> np.ndarray:
    """A copy of another process's page."""
    return np.fromfile(path, dtype=np.uint64).reshape(SHAPE)
