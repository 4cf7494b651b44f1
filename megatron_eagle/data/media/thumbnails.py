"""Small pictures as data URLs, for pages that load nothing."""

import base64
import io

from PIL import Image


def jpeg_url(image: Image.Image, side: int | None = None, quality: int = 80) -> str:
    """An RGB picture as a data URL; of at most `side` pixels a side."""
    if side is not None:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
