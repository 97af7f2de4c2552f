"""leakage.py: identical and near-identical images across splits."""

import io
import itertools
import math
import re

import numpy as np
import pytest
from conftest import shared_data
from PIL import Image, ImageEnhance

import leakage
from errors import UserError
from images import open_image


def bits(a, b):
    return (a ^ b).bit_count()


def noise(number, size=(64, 48)):
    dice = np.random.default_rng(number)
    blocks = Image.fromarray(dice.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return blocks.resize(size, Image.Resampling.BICUBIC)


def sample(name):
    return {"id": name, "image": name, "question": "Is there text?", "answer": "yes"}


def test_the_hash_is_the_median_cut_of_the_low_frequencies_written_out():
    image = noise(5)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    low = [
        sum(
            grey[y, x] * math.cos(math.pi * v * (2 * y + 1) / 64) * math.cos(math.pi * u * (2 * x + 1) / 64)
            for y in range(32)
            for x in range(32)
        )
        for v in range(8)
        for u in range(8)
    ]
    text = "".join("1" if value > np.median(low) else "0" for value in low)
    assert leakage.perceptual_hash(image) == int(text, 2)


def real_images():
    folder = shared_data("kvasir")
    return [
        open_image(path)
        for part in ("kvasir-seg/images", "kvasir-vqa/images", "classes")
        for path in sorted((folder / part).glob("*.jpg"))
    ]


def test_real_images_stay_near_themselves_and_far_from_each_other():
    images = real_images()
    assert len(images) == 27

    def recompressed(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=40)
        return Image.open(buffer)

    changes = (
        recompressed,
        lambda i: i.resize((i.width // 2, i.height // 2)),
        lambda i: ImageEnhance.Brightness(i).enhance(1.2),
    )
    hashes = [leakage.perceptual_hash(image) for image in images]
    for change in changes:
        assert max(bits(h, leakage.perceptual_hash(change(i))) for h, i in zip(hashes, images, strict=True)) <= 4
    assert min(bits(a, b) for a, b in itertools.combinations(hashes, 2)) > leakage.MAX_DISTANCE + 4


def test_identical_files_are_found_across_splits_only(tmp_path):
    for name, number in (("a", 1), ("a_again", 1), ("b", 2), ("c", 3), ("b_copy", 2)):
        noise(number).save(tmp_path / f"{name}.png")
    by_split = {
        "train": [sample("a.png"), sample("a_again.png"), sample("b.png"), sample("b.png")],
        "test": [sample("c.png"), {"id": "x", "images": ["b_copy.png"], "messages": []}],
        "val": [sample("c.png")],
    }
    groups = leakage.find_identical(by_split, tmp_path)
    assert sorted(groups) == [[("test", "c.png"), ("val", "c.png")], [("train", "b.png"), ("test", "b_copy.png")]]
    with pytest.raises(UserError, match=r"2 image\(s\) stand in more than one split.*train:b\.png = test:b_copy\.png"):
        leakage.refuse_identical(by_split, tmp_path)
    leakage.refuse_identical({"train": by_split["train"], "val": by_split["val"]}, tmp_path)


def test_files_whose_size_is_alone_are_not_read(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"x" * (10 + number))
    monkeypatch.setattr(leakage, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    by_split = {"train": [sample("0.png"), sample("1.png")], "test": [sample("2.png"), sample("3.png")]}
    assert leakage.find_identical(by_split, tmp_path) == []


def test_near_identical_images_are_found_across_splits_nearest_first(tmp_path):
    noise(1).save(tmp_path / "a.png")
    noise(1).save(tmp_path / "a_same_split.jpg", quality=50)
    noise(1, (128, 96)).save(tmp_path / "a_large.png")
    noise(2).save(tmp_path / "b.png")
    ImageEnhance.Brightness(noise(2)).enhance(1.1).save(tmp_path / "b_bright.png")
    noise(3).save(tmp_path / "c.png")
    by_split = {
        "train": [sample("a.png"), sample("a_same_split.jpg"), sample("b.png")],
        "val": [sample("c.png")],
        "test": [sample("a_large.png"), sample("b_bright.png")],
    }
    pairs = leakage.find_near_identical(by_split, tmp_path)
    assert {(pair.split_a, pair.image_a, pair.split_b, pair.image_b) for pair in pairs} == {
        ("train", "a.png", "test", "a_large.png"),
        ("train", "a_same_split.jpg", "test", "a_large.png"),
        ("train", "b.png", "test", "b_bright.png"),
    }
    assert [pair.distance for pair in pairs] == sorted(pair.distance for pair in pairs)
    assert leakage.find_near_identical(by_split, tmp_path, max_distance=-1) == []


def test_vectorised_distances_equal_the_plain_count(monkeypatch):
    monkeypatch.setattr(leakage, "_ROWS_AT_ONCE", 7)  # several blocks
    dice = np.random.default_rng(0)
    hashes = {f"{split}{n}": int(dice.integers(0, 2**64, dtype=np.uint64)) for split in "abc" for n in range(20)}
    by_split = {split: [sample(f"{split}{n}") for n in range(20)] for split in "abc"}
    pairs = leakage.find_near_identical(by_split, "unused", max_distance=26, hashes=hashes)
    expected = {
        (bits(hashes[a], hashes[b]), a, b)
        for a, b in itertools.combinations(hashes, 2)
        if a[0] != b[0] and bits(hashes[a], hashes[b]) <= 26
    }
    assert len(expected) > 10 and {(pair.distance, pair.image_a, pair.image_b) for pair in pairs} == expected


def test_each_distinct_file_is_decoded_once(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        noise(number // 2).save(path)
    decoded = []
    monkeypatch.setattr(leakage, "open_image", lambda path: decoded.append(path) or open_image(path))
    found, broken = leakage.fingerprint([*paths, *paths])
    assert len(decoded) == 3 and not broken and set(found) == set(paths)
    assert [found[path].phash for path in paths] == [leakage.perceptual_hash(open_image(path)) for path in paths]


def test_an_unreadable_image_is_reported_and_the_others_are_hashed(tmp_path):
    noise(1).save(tmp_path / "good.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-300])
    found, broken = leakage.fingerprint([tmp_path / "good.jpg", tmp_path / "half.jpg", tmp_path / "absent.jpg"])
    assert [path.name for path in found] == ["good.jpg"]
    assert [path.name for path in broken] == ["half.jpg", "absent.jpg"]
    with pytest.raises(UserError, match=r"1 image\(s\) cannot be read: .*half\.jpg"):
        leakage.find_near_identical({"train": [sample("good.jpg")], "test": [sample("half.jpg")]}, tmp_path)
    with pytest.raises(UserError, match=r"test image absent\.jpg: No such file"):
        leakage.find_identical({"train": [sample("good.jpg")], "test": [sample("absent.jpg")]}, tmp_path)


def test_the_page_is_self_contained_and_shows_both_images_of_the_nearest_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(leakage, "PAIRS_SHOWN", 2)
    noise(1, (800, 600)).save(tmp_path / "a<b>.png")
    pairs = [leakage.NearPair(distance, "train", "a<b>.png", "test", "a<b>.png") for distance in (0, 2, 4)]
    page = leakage.side_by_side(pairs, tmp_path)
    assert page.count("<section>") == 2 and "3 pair(s), the nearest 2 with" in page
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img") == 4
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|<script""", page)
    assert "What to do next" in page and "move every sample of one image into the split of the other" in page
    page_of_command = leakage.side_by_side(pairs, tmp_path, "Run it with --keep-together <pairs>")
    assert "--keep-together &lt;pairs&gt;." in page_of_command and "move every sample" not in page_of_command
    assert "4 bits: train a&lt;b&gt;.png – test a&lt;b&gt;.png" in page and "a<b>" not in page


def test_every_image_of_a_sample_is_compared_and_not_only_its_first(tmp_path):
    for name, number in (("a", 1), ("b", 2), ("c", 3), ("d", 2)):
        noise(number).save(tmp_path / f"{name}.png")
    noise(2).save(tmp_path / "like_b.jpg", quality=90)
    train = [{"id": "x", "images": ["a.png", "b.png"]}]
    same, alike = ([{"id": "y", "images": ["c.png", second]}] for second in ("d.png", "like_b.jpg"))
    with pytest.raises(UserError, match=r"train:b\.png = test:d\.png"):
        leakage.refuse_identical({"train": train, "test": same}, tmp_path)
    (pair,) = leakage.find_near_identical({"train": train, "test": alike}, tmp_path)
    assert (pair.image_a, pair.image_b) == ("b.png", "like_b.jpg")
