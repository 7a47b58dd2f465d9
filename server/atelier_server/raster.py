"""A picture's file as every room reads it: upright, RGB of eight bits, opaque."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageOps

_SEE_THROUGH = ("P", "PA", "LA", "La", "RGBA", "RGBa")


@dataclass(frozen=True, slots=True, eq=False)
class Raster:
    """RGB on a ground, and the opacity ("L") that it had; None: opaque throughout."""

    image: Image.Image
    opacity: Image.Image | None = None

    @classmethod
    def of(cls, image: Image.Image, ground: str = "white") -> Raster:
        """Turned as its EXIF orientation says; `ground` shows where it is transparent."""
        image = ImageOps.exif_transpose(image)
        opacity = None
        if image.mode in _SEE_THROUGH or "transparency" in image.info:
            image = image.convert("RGBA")
            opacity = image.getchannel("A")
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
        elif image.mode.startswith("I;16"):
            image = _high_bytes(image)
        return cls(image.convert("RGB"), opacity)


def _high_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey in eight bits: Pillow would clip it to white where its high byte is meant."""
    first = 0 if image.mode == "I;16B" else 1
    return Image.frombytes("L", image.size, image.tobytes()[first::2])
