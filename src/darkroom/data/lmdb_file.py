"""Where the values of an LMDB environment lie in its file: read-only, without the library.

Format: the `data.mdb` of LMDB 0.9 (lmdb.tech, mdb.c), little-endian, 64 bits. Two meta pages say, in turn, where the
root of the main B+tree is; branch pages lead to leaf pages; a large value lies in overflow pages, in one stretch.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

DATA = "data.mdb"
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE_HEADER = 16  # pgno (8), pad (2), flags (2), lower and upper bounds of the free space (2, 2)
_BRANCH, _LEAF, _META, _LEAF2 = 0x01, 0x02, 0x08, 0x20
_BIG, _SUB, _DUPLICATES = 0x01, 0x02, 0x04
_NONE = 2**64 - 1
_DEEPEST = 64


def is_lmdb(folder: Path) -> bool:
    """Whether a folder is an LMDB environment."""
    return (folder / DATA).is_file()


def lmdb_values(file: Path) -> Iterator[tuple[bytes, int, int]]:
    """(key, offset, size) of every value of the main database, in the order of the keys.

    Raises ValueError for what is not such a file or is damaged.
    """
    with open(file, "rb") as handle:
        try:
            view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError("the file is empty") from None
        with view:
            try:
                page_size, root = _newest_root(view)
                if root != _NONE:
                    yield from _page(view, page_size, root, 0)
            except struct.error:
                raise ValueError("the file ends too early") from None


def _newest_root(view: mmap.mmap) -> tuple[int, int]:
    """Page size and root page of the main database, as the later of the two meta pages says."""
    page_size = 0
    roots = {}
    for number in (0, 1):
        at = number * page_size
        (flags,) = struct.unpack_from("<H", view, at + 10)
        magic, version = struct.unpack_from("<II", view, at + _PAGE_HEADER)
        if not flags & _META or magic != _MAGIC or version & 0xFFFF != _VERSION:
            raise ValueError("not an LMDB file of version 1 (64 bits, little-endian)")
        # After magic, version, address and size of the map: two databases of 48 bytes, the free list and the main one.
        # The first one's first field is the page size.
        first = at + _PAGE_HEADER + 24
        (page_size,) = struct.unpack_from("<I", view, first)
        (root,) = struct.unpack_from("<Q", view, first + 48 + 40)
        (transaction,) = struct.unpack_from("<Q", view, first + 96 + 8)
        roots[transaction] = root
    return page_size, roots[max(roots)]


def _page(view: mmap.mmap, page_size: int, number: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """All values below a page of the tree."""
    start = number * page_size
    flags, lower = struct.unpack_from("<HH", view, start + 10)
    if depth > _DEEPEST or flags & _LEAF2 or not flags & (_BRANCH | _LEAF):
        raise ValueError(f"page {number} is no page of a tree of single values")
    count = (lower - _PAGE_HEADER) // 2
    for (offset,) in struct.iter_unpack("<H", view[start + _PAGE_HEADER : start + _PAGE_HEADER + 2 * count]):
        node = start + offset
        low, high, node_flags, key_size = struct.unpack_from("<HHHH", view, node)
        if flags & _BRANCH:
            yield from _page(view, page_size, low | high << 16 | node_flags << 32, depth + 1)
            continue
        if node_flags & (_SUB | _DUPLICATES):
            raise ValueError("it holds several databases or several values of a key; one value a key is expected")
        key, value = view[node + 8 : node + 8 + key_size], node + 8 + key_size
        if node_flags & _BIG:
            (overflow,) = struct.unpack_from("<Q", view, value)
            value = overflow * page_size + _PAGE_HEADER
        size = low | high << 16
        if value + size > len(view):
            raise struct.error
        yield key, value, size
