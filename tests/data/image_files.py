"""Images, folders and tables that the tests make for themselves."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def write(path: str | Path, content: bytes) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def folder(root: str | Path, **counts: int) -> Path:
    """A folder of class folders (`a=3`) or of split folders (`**{"train/a": 3}`), of distinct PNGs."""
    for place, (name, count) in enumerate(sorted(counts.items())):
        for number in range(count):
            image = noise(1000 * place + number)
            write(Path(root) / name / f"{number:03}.png", encoded(image, "PNG"))
    return Path(root)


def raw_png(colour_type: int, depth: int, rows: bytes, width: int, height: int) -> bytes:
    """A PNG of raw samples: for 16 bits per colour, which Pillow cannot write, and for sizes that lie."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
