"""JPEG by libjpeg-turbo without the way through Pillow's image: about 1.4 times as fast, and the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def decodes(image: Image, channels: int) -> bool:
    """Whether `decode` gives the pixels that Pillow would: grey made of colours is rounded differently."""
    return image.format == "JPEG" and (image.mode == "L" or (image.mode == "RGB" and channels == 3))


def decode(content: bytes, channels: int) -> NDArray[np.uint8] | None:
    """uint8 `[H, W, channels]` of a JPEG file whose size is known to be allowed; None where anything is wrong with it:
    Pillow then says what, or mends it.
    """
    import simplejpeg

    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, "RGB" if channels == 3 else "GRAY"
        )
    except ValueError:
        return None
    return pixels
