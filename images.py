"""An image file -> the pixels the model sees: decode, letterbox or native resize, cut into patches.

Pixels travel as uint8 patches without the temporal copy (1.8 MB for 768², where the stock processor's float32 is
14 MB); `model.normalise_patches` finishes the work on the device, equal to the family's own image processor.
"""

import contextlib
import math
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from errors import UserError

LETTERBOX_FILL = (0, 0, 0)  # black, as the border of an endoscope's round image


_OPENING = threading.Lock()  # warning filters belong to the whole process, and images are decoded in several threads


@contextlib.contextmanager
def _opened(path):
    """An image file with its header read. Raises: `UserError` naming the file, whatever its reader stumbles over."""
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            yield image
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist; correct the path or data.image_root") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"image {path} has more than {limit} pixels (a decompression bomb?); shrink it") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {path} cannot be decoded ({reason}); replace or drop it") from None


def open_image(path) -> Image.Image:
    """Decode an image fully, turned upright by its EXIF orientation, as RGB.

    Transparent pixels lie on white; 16-bit values keep their upper 8 bits. Raises: `UserError` naming the file, also
    for a truncated file (Pillow's `open` and `verify` accept half a JPEG) and for a decompression bomb.
    """
    with _opened(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if (
        image.mode.startswith("I") or image.mode == "F"
    ):  # 16-bit and 32-bit greyscale: convert("RGB") would clip to white
        values = np.asarray(image, dtype=np.float64)
        peak = values.max(initial=0.0)
        full_scale = 65535.0 if image.mode.startswith("I;16") or peak > 255 else 1.0 if peak <= 1 else 255.0
        image = Image.fromarray((values.clip(0, full_scale) / full_scale * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Placement:
    """Where the original lies in the image the model sees. All lengths in pixels; sizes are (width, height)."""

    original_size: tuple[int, int]
    model_size: tuple[int, int]
    content_size: tuple[int, int]  # the resized original, without padding
    offset: tuple[int, int] = (0, 0)  # its upper left corner

    def to_model(self, x: float, y: float) -> tuple[float, float]:
        """A point of the original, in pixels of the image the model sees."""
        return (
            x * self.content_size[0] / self.original_size[0] + self.offset[0],
            y * self.content_size[1] / self.original_size[1] + self.offset[1],
        )

    def to_original(self, x: float, y: float) -> tuple[float, float]:
        """A point of the image the model sees, in pixels of the original, clamped to it."""
        width, height = self.original_size
        return (
            min(max((x - self.offset[0]) * width / self.content_size[0], 0.0), float(width)),
            min(max((y - self.offset[1]) * height / self.content_size[1], 0.0), float(height)),
        )


def upright_size(path) -> tuple[int, int]:
    """(width, height) of an image file as `open_image` gives it, from its header alone. Raises: `UserError`."""
    with _opened(path) as image:
        return image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size  # turned by EXIF


def letterbox_placement(width: int, height: int, size: int) -> Placement:
    """Where an image lies in a size × size square: aspect kept, centred."""
    scale = size / max(width, height)
    content = (max(1, round(width * scale)), max(1, round(height * scale)))
    offset = ((size - content[0]) // 2, (size - content[1]) // 2)
    return Placement((width, height), (size, size), content, offset)


def letterbox(image: Image.Image, size: int) -> tuple[Image.Image, Placement]:
    """Fit an image into a size × size square, padded with `LETTERBOX_FILL`."""
    placement = letterbox_placement(*image.size, size)
    canvas = Image.new("RGB", (size, size), LETTERBOX_FILL)
    canvas.paste(image.resize(placement.content_size, Image.Resampling.BICUBIC), placement.offset)
    return canvas, placement


def native_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (width, height) of the families' own resizing: multiples of `factor`, total between the two bounds.

    Source: Qwen2-VL's image processor; a test holds the two equal. Raises: `UserError` for a strip longer than 200 : 1.
    """
    if max(width, height) > 200 * min(width, height):
        raise UserError(f"image of {width}×{height} is longer than 200:1; use resize: letterbox or crop it")

    def total_within(rounding, ratio: float) -> tuple[int, int]:
        return tuple(max(factor, rounding(side / ratio / factor) * factor) for side in (width, height))

    fitted = (round(width / factor) * factor, round(height / factor) * factor)  # half to even, as theirs
    if fitted[0] * fitted[1] > max_pixels:
        return total_within(math.floor, math.sqrt(width * height / max_pixels))
    if fitted[0] * fitted[1] < min_pixels:
        ratio = math.sqrt(min_pixels / (width * height))
        return (math.ceil(width * ratio / factor) * factor, math.ceil(height * ratio / factor) * factor)
    return fitted


def native_placement(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> Placement:
    size = native_size(width, height, factor, min_pixels, max_pixels)
    return Placement((width, height), size, size)


def native_resize(image: Image.Image, factor: int, min_pixels: int, max_pixels: int) -> tuple[Image.Image, Placement]:
    """Resize as the family's own image processor does, under `max_pixels`."""
    placement = native_placement(*image.size, factor, min_pixels, max_pixels)
    return image.resize(placement.model_size, Image.Resampling.BICUBIC), placement


def patchify(image: Image.Image, patch_size: int, merge_size: int) -> np.ndarray:
    """Cut an image into patches, the merge_size² patches of one image token side by side.

    Returns uint8 (patches, 3 × patch_size × patch_size): the stock order without the temporal copy.
    """
    pixels = np.asarray(image, dtype=np.uint8)  # (height, width, 3)
    rows, columns = pixels.shape[0] // (patch_size * merge_size), pixels.shape[1] // (patch_size * merge_size)
    pixels = pixels.reshape(rows, merge_size, patch_size, columns, merge_size, patch_size, 3)
    # -> (row, column, row in token, column in token, channel, y, x)
    return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch_size * patch_size)


def unpatchify(patches: np.ndarray, grid: tuple[int, int], patch_size: int, merge_size: int) -> np.ndarray:
    """The inverse of `patchify`: uint8 (height, width, 3). grid: (height, width) in patches."""
    rows, columns = grid[0] // merge_size, grid[1] // merge_size
    pixels = patches.reshape(rows, columns, merge_size, merge_size, 3, patch_size, patch_size)
    return pixels.transpose(0, 2, 5, 1, 3, 6, 4).reshape(grid[0] * patch_size, grid[1] * patch_size, 3)


@dataclass(frozen=True)
class ModelImage:
    """One image as it travels to the device."""

    path: str  # as in the sample
    patches: np.ndarray | None  # uint8 (patches, 3 × patch_size²)
    grid: tuple[int, int]  # (height, width) in patches
    placement: Placement


def image_path(image_root, relative: str) -> Path:
    """The file of an image path in a sample. Raises: `UserError` where it leaves `image_root`."""
    return Path(image_root, refuse_outside(image_root, relative))


def refuse_outside(image_root, relative: str) -> str:
    """The path without `.` and `..`. Raises: `UserError` where it leaves `image_root`.

    Purely lexical, so that a symbolic link inside the root may point to another disk, and `link/..` is the root again.
    """
    path = os.path.normpath(relative)
    if os.path.isabs(path):
        leaves = not Path(path).is_relative_to(os.path.abspath(image_root))
    else:
        leaves = path == ".." or path.startswith("../")
    if leaves:
        raise UserError(f"image path {relative!r} leaves data.image_root ({image_root}); keep images inside it")
    return path
