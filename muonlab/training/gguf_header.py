"""Whether a GGUF file is whole, read from its header before anything is built from it.

    header   magic, version, number of tensors, number of settings
    settings name, type, value: a number, a text, or an array of one of these
    tensors  name, sizes, type, where its data begin
    data     from the next multiple of the alignment on

The readers that there are believe the counts in a header: one that promises 2^60 entries makes them allocate until
the machine gives up. Here every count is held against the bytes that are left in the file, and nothing is allocated
for it. What a setting or a tensor means is not looked at.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Those that counts of 64 bits have. A file of the other byte order shows another version."""

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a setting's type -> bytes of a value."""
UINT32, STRING, ARRAY = 4, 8, 9

MOST_ENTRIES = 2**20
"""In one array, and the most settings or tensors: a vocabulary of 262,144 has about 520,000 merges, and readers keep
an object for each entry."""
MOST_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


class BrokenFileError(ValueError):
    """A file that is not a whole GGUF file; the message says what is wrong with it, and where."""


class Contents(NamedTuple):
    """What a whole file holds."""

    tensors: int
    elements: int
    """Over all tensors."""


def read(path: Path) -> Contents:
    """What the file holds; raises BrokenFileError where it is not whole, and OSError."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise BrokenFileError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).walk()


class _Header:
    """A place in the file, which moves on by what is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.alignment = data, 0, DEFAULT_ALIGNMENT

    def walk(self) -> Contents:
        if self.data[: len(MAGIC)] != MAGIC:
            raise BrokenFileError(f"it begins with {self.data[: len(MAGIC)]!r}, not with {MAGIC!r}")
        self.skip(len(MAGIC), "the magic")
        version = self.number("<I", "the version")
        if version not in VERSIONS:
            raise BrokenFileError(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are read")
        tensors = self.count("the number of tensors")
        for _ in range(self.count("the number of settings")):
            self.setting()
        ends = [self.tensor() for _ in range(tensors)]
        begin = -(-self.at // self.alignment) * self.alignment
        for name, elements, last in ends:
            if begin + last > len(self.data):
                raise BrokenFileError(
                    f"tensor {name!r} of {elements:,} elements ends at byte {begin + last:,}, and the file at "
                    f"{len(self.data):,}"
                )
        return Contents(tensors, sum(elements for _, elements, _ in ends))

    def setting(self) -> None:
        name = self.text("the name of a setting")
        kind = self.number("<I", f"the type of {name!r}")
        begin = self.at
        if kind != ARRAY:
            self.values(name, kind, 1)
        else:
            kind = self.number("<I", f"the type of the entries of {name!r}")
            self.values(name, kind, self.count(f"the number of entries of {name!r}"))
        if name == "general.alignment" and kind == UINT32:
            (self.alignment,) = struct.unpack_from("<I", self.data, begin)
            if self.alignment == 0 or self.alignment & (self.alignment - 1):
                raise BrokenFileError(f"general.alignment is {self.alignment}, which is no power of two")

    def values(self, name: str, kind: int, count: int) -> None:
        if kind == STRING:
            for _ in range(count):
                self.text(f"a text of {name!r}")
        elif kind in SCALAR_BYTES:
            self.skip(count * SCALAR_BYTES[kind], f"the {count:,} values of {name!r}")
        else:
            raise BrokenFileError(f"setting {name!r} is of type {kind}, which is none that is read")

    def tensor(self) -> tuple[str, int, int]:
        """Name, elements, and where its data end, counted from where all data begin."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text("the name of a tensor")
        dimensions = self.number("<I", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise BrokenFileError(f"tensor {name!r} has {dimensions} dimensions, where 1 to {MOST_DIMENSIONS} are read")
        elements = math.prod(self.number("<Q", f"the sizes of {name!r}") for _ in range(dimensions))
        kind = self.number("<I", f"the type of {name!r}")
        offset = self.number("<Q", f"the place of {name!r}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise BrokenFileError(f"tensor {name!r} is of type {kind}, which is none that is known") from None
        if elements % block:
            raise BrokenFileError(f"tensor {name!r} has {elements:,} elements in blocks of {block}")
        return name, elements, offset + elements // block * block_bytes

    def count(self, what: str) -> int:
        found = self.number("<Q", what)
        if found > MOST_ENTRIES:
            raise BrokenFileError(f"{what} is {found:,}, over the {MOST_ENTRIES:,} that are read")
        return found

    def text(self, what: str) -> str:
        size = self.number("<Q", f"the length of {what}")
        begin = self.at
        self.skip(size, what)
        return bytes(self.data[begin : begin + min(size, 80)]).decode(errors="replace")

    def number(self, layout: str, what: str) -> int:
        begin = self.at
        self.skip(struct.calcsize(layout), what)
        (found,) = struct.unpack_from(layout, self.data, begin)
        return int(found)

    def skip(self, size: int, what: str) -> None:
        """Move on by so many bytes, all of them in the file."""
        if size > len(self.data) - self.at:
            raise BrokenFileError(
                f"{what}, at byte {self.at:,}, would take {size:,} bytes of the {len(self.data) - self.at:,} left"
            )
        self.at += size
