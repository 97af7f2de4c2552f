"""Any image file becomes the pixels that the family's own image processor would make of it, or a clear error."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import shared_data
from PIL import Image
from support.tiny_runs import FAMILIES, IMAGE_SIZE
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from errors import UserError
from family import load_family
from images import (
    LETTERBOX_FILL,
    Placement,
    image_path,
    letterbox,
    letterbox_placement,
    native_resize,
    native_size,
    open_image,
    patchify,
    upright_size,
)
from model import normalise_patches


def noise(width: int, height: int, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


# ---------------------------------------------------------------------------------------- the processor's own pixels


def own_patches(image: Image.Image, family) -> torch.Tensor:
    return normalise_patches(torch.from_numpy(patchify(image, family.patch_size, family.merge_size)), family)


def real_images() -> list:
    return sorted(shared_data("kvasir/kvasir-vqa").glob("images/*.jpg"))


@pytest.mark.parametrize("name", FAMILIES)
def test_letterboxed_pixels_equal_the_image_processors_bit_for_bit(tiny_models, name):
    family = load_family(str(tiny_models[name]))
    processor = AutoImageProcessor.from_pretrained(tiny_models[name], backend="pil")
    images = [open_image(path) for path in real_images()]
    for image in [*images, noise(1, 1), noise(7, 300), noise(301, 40), noise(IMAGE_SIZE[name], 5)]:
        boxed, _ = letterbox(image, 3 * IMAGE_SIZE[name])
        theirs = processor(images=[boxed], return_tensors="pt")
        assert theirs["image_grid_thw"].tolist() == [[1] + [3 * IMAGE_SIZE[name] // family.patch_size] * 2]
        assert torch.equal(own_patches(boxed, family), theirs["pixel_values"])


@pytest.mark.parametrize("name", FAMILIES)
def test_native_pixels_equal_the_image_processors_bit_for_bit(tiny_models, name):
    family = load_family(str(tiny_models[name]))
    for limit in (None, 40_000):
        processor = AutoImageProcessor.from_pretrained(tiny_models[name], backend="pil")
        if limit:
            processor.size = {"shortest_edge": family.min_pixels, "longest_edge": limit}
        images = [open_image(path) for path in real_images()]
        for image in [*images, noise(3, 3), noise(33, 190), noise(479, 63), noise(333, 222)]:
            resized, placement = native_resize(image, family.factor, family.min_pixels, limit or family.max_pixels)
            theirs = processor(images=[image], return_tensors="pt")
            grid = [1, resized.height // family.patch_size, resized.width // family.patch_size]
            assert theirs["image_grid_thw"].tolist() == [grid]
            assert torch.equal(own_patches(resized, family), theirs["pixel_values"])
            assert placement.model_size == placement.content_size == resized.size


@pytest.mark.parametrize("factor", [28, 32])
def test_native_size_equals_the_processors_smart_resize(factor):
    generator = np.random.default_rng(factor)
    compared = 0
    for _ in range(20_000):
        width, height = (int(10 ** generator.uniform(0, 3.7)) for _ in range(2))
        if generator.random() < 0.3:  # exact halves of the factor, where rounding could differ
            width, height = (factor * int(generator.integers(1, 60)) + factor // 2 for _ in range(2))
        low, high = sorted(int(10 ** generator.uniform(2.5, 7.2)) for _ in range(2))
        if max(width, height) > 200 * min(width, height):
            continue
        theirs = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        assert native_size(width, height, factor, low, high) == theirs[::-1], (width, height, low, high)
        compared += 1
    assert compared > 15_000


def test_patches_travel_as_bytes_an_eighth_of_the_processors_floats(tiny_models):
    patches = patchify(noise(96, 96), 16, 2)
    floats = normalise_patches(torch.from_numpy(patches), load_family(str(tiny_models["qwen3_vl"])))
    assert patches.dtype == np.uint8 and patches.nbytes == 96 * 96 * 3
    assert floats.nbytes == 8 * patches.nbytes


# ------------------------------------------------------------------------------------------------ any kind of file


def saved(tmp_path, image: Image.Image, name: str, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_exif_orientation_turns_the_image_upright(tmp_path):
    upright = Image.new("RGB", (40, 20), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 10, 20))  # blue at the left
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, stored in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("png", "jpg"):
            path = saved(tmp_path, upright.transpose(stored), f"{orientation}.{suffix}", exif=exif, quality=95)
            opened = open_image(path)
            assert opened.size == (40, 20)
            left, right = np.asarray(opened)[10, 3], np.asarray(opened)[10, 36]
            assert left[2] > 200 > 60 > left[0] and right[0] > 200 > 60 > right[2]


def row_of(values, kind=np.uint8, mode=None) -> Image.Image:
    """An image one pixel high."""
    return Image.fromarray(np.array([values], dtype=kind), mode=mode)


def grey_with_alpha() -> Image.Image:
    image = row_of([0, 100, 255]).convert("LA")
    image.putalpha(row_of([255, 255, 0]))
    return image


def palette_image() -> Image.Image:
    image = row_of([0, 1, 2], mode="P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 99])
    return image


BLACK, GREY, WHITE = [0] * 3, [100] * 3, [255] * 3
PALETTE = [[10, 20, 30], [200, 0, 0], [0, 0, 99]]
RGBA = [[9, 8, 7, 255], [9, 8, 7, 0], [0, 0, 0, 51]]
CMYK = [[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (row_of([0, 100, 255]), "grey.png", {}, [BLACK, GREY, WHITE]),
        (row_of([0, 100, 255]).convert("1", dither=0), "bits.png", {}, [BLACK, BLACK, WHITE]),
        (grey_with_alpha(), "la.png", {}, [BLACK, GREY, WHITE]),
        (palette_image(), "palette.png", {}, PALETTE),
        (palette_image(), "clear.png", {"transparency": 2}, [*PALETTE[:2], WHITE]),
        (palette_image(), "palette.gif", {}, PALETTE),
        (row_of(RGBA), "rgba.png", {}, [[9, 8, 7], WHITE, [204] * 3]),
        (row_of(CMYK, mode="CMYK"), "cmyk.tif", {}, [WHITE, [255, 0, 0], BLACK]),
        (row_of([0, 25700, 65535], np.uint16), "deep.png", {}, [BLACK, GREY, WHITE]),
        (row_of([0, 100, 200], np.uint16), "dark.png", {}, [BLACK, BLACK, [1] * 3]),
        (row_of([0, 0.5, 1.0], np.float32), "float.tif", {}, [BLACK, [128] * 3, WHITE]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_the_rgb_a_viewer_would_show(tmp_path, image, name, options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(saved(tmp_path, image, name, **options))
    assert opened.mode == "RGB"
    assert pixels(opened) == [expected]


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    red = Image.new("RGB", (32, 32), (200, 30, 30)).convert("CMYK")
    opened = open_image(saved(tmp_path, red, "cmyk.jpg", quality=95))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened)[16, 16].astype(int) - [200, 30, 30]).max() < 12


# -------------------------------------------------------------------------------------------------------- bad files


def half_a_jpeg() -> bytes:
    stream = io.BytesIO()
    noise(200, 200).save(stream, "JPEG")
    return stream.getvalue()[: stream.tell() // 2]


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has these many pixels, in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BAD_FILES = {
    "truncated.jpg": half_a_jpeg(),
    "empty.png": b"",
    "text.jpg": b"this is a text",
    "header.png": b"\x89PNG\r\n\x1a\n",
    "bomb.png": bomb(40_000, 40_000),
    "small_bomb.png": bomb(10_000, 9_000),  # Pillow only warns of this one
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_is_an_error_of_one_line_that_names_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(UserError) as caught:
        open_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    if "bomb" in name:
        assert "pixels" in str(caught.value)


def test_half_a_jpeg_passes_pillows_open_and_verify_so_only_decoding_finds_it(tmp_path):
    (tmp_path / "half.jpg").write_bytes(half_a_jpeg())
    Image.open(tmp_path / "half.jpg").verify()


def test_bombs_are_found_in_every_thread_whatever_the_others_do(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    (tmp_path / "bomb.png").write_bytes(BAD_FILES["small_bomb.png"])
    saved(tmp_path, noise(30, 30), "good.png")

    def is_refused(name) -> bool:
        try:
            open_image(tmp_path / name)
        except UserError as error:
            return "decompression bomb" in str(error)
        return False

    names = ["bomb.png", "good.png", "bomb.png"] * 300
    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(pool.map(is_refused, names)) == ["bomb" in name for name in names]


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot be decoded"):
        open_image(tmp_path)


# ------------------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize("bad", ["../a.png", "a/../../b.png", "a/b/../../../c.png", "/etc/passwd", ".."])
def test_a_path_that_leaves_the_image_root_is_an_error(tmp_path, bad):
    with pytest.raises(UserError, match=r"leaves data\.image_root"):
        image_path(tmp_path / "images", bad)


def test_paths_inside_the_image_root_are_fine_symbolic_links_included(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "images", tmp_path / "other_disk"
    (elsewhere / "deep").mkdir(parents=True)
    root.mkdir()
    saved(elsewhere / "deep", noise(4, 4), "a.png")
    (root / "link").symlink_to(elsewhere / "deep")
    for good in ("link/a.png", "link/../link/a.png", "./link/a.png", str(root / "link" / "a.png")):
        assert open_image(image_path(root, good)).size == (4, 4)
    monkeypatch.chdir(tmp_path)
    assert open_image(image_path("images", str(root / "link" / "a.png"))).size == (4, 4)
    assert open_image(image_path(".", "images/link/a.png")).size == (4, 4)


def test_two_dots_behind_a_symbolic_link_do_not_leave_the_image_root(tmp_path):
    """The system would follow the link first: images/link/../secret.png is other_disk/secret.png."""
    root, elsewhere = tmp_path / "images", tmp_path / "other_disk"
    (elsewhere / "deep").mkdir(parents=True)
    root.mkdir()
    saved(elsewhere, noise(9, 9), "secret.png")
    saved(root, noise(4, 4), "secret.png")
    (root / "link").symlink_to(elsewhere / "deep")
    assert open_image(image_path(root, "link/../secret.png")).size == (4, 4)


# -------------------------------------------------------------------------------------------------------- letterbox


def test_a_strip_of_one_pixel_letterboxes_and_is_a_clear_error_at_native_size():
    for strip in (noise(1, 4000), noise(4000, 1)):
        boxed, placement = letterbox(strip, 128)
        assert boxed.size == (128, 128) and sorted(placement.content_size) == [1, 128]
        with pytest.raises(UserError, match="letterbox"):
            native_resize(strip, 28, 3136, 1_000_000)


def test_letterbox_keeps_the_aspect_centres_the_image_and_pads_in_black():
    boxed, placement = letterbox(Image.new("RGB", (300, 100), (10, 200, 30)), 90)
    assert placement == Placement((300, 100), (90, 90), (90, 30), (0, 30))
    array = np.asarray(boxed)
    assert (array[30:60] == (10, 200, 30)).all()
    assert (array[:30] == LETTERBOX_FILL).all() and (array[60:] == LETTERBOX_FILL).all()
    image = noise(100, 80)
    boxed, placement = letterbox(image, 64)
    inside = boxed.crop((0, 6, 64, 57))
    assert placement.offset == (0, 6) and placement.content_size == inside.size
    assert pixels(inside) == pixels(image.resize(inside.size, Image.Resampling.BICUBIC)), "as the image processors do"
    square, placement = letterbox(noise(90, 90), 90)
    assert pixels(square) == pixels(noise(90, 90)) and placement.offset == (0, 0)


def test_a_point_comes_back_from_the_model_image_to_where_it_was():
    generator = np.random.default_rng(0)
    for _ in range(2_000):
        width, height = (int(10 ** generator.uniform(0, 3.3)) for _ in range(2))
        if generator.random() < 0.5 and max(width, height) <= 200 * min(width, height):
            size = native_size(width, height, 28, 3136, 1_000_000)
            placement = Placement((width, height), size, size)
        else:
            placement = letterbox_placement(width, height, 64)
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        model_x, model_y = placement.to_model(x, y)
        assert 0 <= model_x <= placement.model_size[0] and 0 <= model_y <= placement.model_size[1]
        assert placement.to_original(model_x, model_y) == pytest.approx((x, y))


def test_a_point_on_the_padding_comes_back_on_the_images_edge():
    _, placement = letterbox(Image.new("RGB", (300, 100)), 90)
    assert placement.to_original(45, 0) == (150, 0)
    assert placement.to_original(45, 89) == (150, 100)


def test_the_size_of_a_file_is_known_from_its_header_and_is_that_of_the_upright_image(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, noise(30, 20), f"turned {orientation}.jpg", exif=exif)
        assert upright_size(path) == open_image(path).size == ((30, 20) if orientation < 5 else (20, 30))
    (tmp_path / "half.jpg").write_bytes(half_a_jpeg())
    assert upright_size(tmp_path / "half.jpg") == (200, 200)
    for name in ("empty.png", "text.jpg", "bomb.png", "small_bomb.png"):
        (tmp_path / name).write_bytes(BAD_FILES[name])
        with pytest.raises(UserError, match=name):
            upright_size(tmp_path / name)
