"""Find images that stand in more than one split: identical files, and near-identical ones for a human to judge.

The hash is the DCT perceptual hash (pHash; Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions"): 32×32 grey pixels, the 8×8 lowest frequencies, one bit each for above or below their median.
"""

import html
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import UserError, first_names
from files import file_sha256
from images import image_path, open_image
from report.page import thumbnail
from templates import image_paths

# Bits of 64. Measured on 27 real endoscopy images: recompressed, halved or brightened by 20 %: at most 4; shifted by
# 8 pixels: at most 8; different images: at least 12.
MAX_DISTANCE = 6
PAIRS_SHOWN = 300  # side by side
PAIRS_NAMED = 10_000  # after those, by name only; the count is of all
THUMBNAIL_PIXELS = 256
HASH_PIXELS = 32
HASH_SIDE = 8
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Fingerprint:
    sha256: str  # of the file's bytes
    phash: int  # 64 bits


@dataclass(frozen=True)
class NearPair:
    distance: int  # bits of 64 that differ
    split_a: str
    image_a: str  # as in the samples: relative to image_root
    split_b: str
    image_b: str


def _dct_matrix() -> np.ndarray:
    """The first rows of the type-II DCT, (HASH_SIDE, HASH_PIXELS); scale does not matter to a comparison of medians."""
    frequency = np.arange(HASH_SIDE)[:, None]
    pixel = np.arange(HASH_PIXELS)[None, :]
    return np.cos(np.pi * frequency * (2 * pixel + 1) / (2 * HASH_PIXELS))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay nearly the same when an image is scaled, recompressed or brightened."""
    grey = image.convert("L").resize((HASH_PIXELS, HASH_PIXELS), Image.Resampling.LANCZOS)
    matrix = _dct_matrix()
    low = matrix @ np.asarray(grey, dtype=np.float64) @ matrix.T  # (HASH_SIDE, HASH_SIDE)
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def fingerprint(paths: Sequence[Path]) -> tuple[dict[Path, Fingerprint], dict[Path, str]]:
    """Hash every file, and fully decode each distinct one once, several at a time.

    Returns: path -> fingerprint, and path -> what is wrong for the files that cannot be read as an image.
    """
    paths = list(dict.fromkeys(Path(path) for path in paths))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(paths, pool.map(_try(file_sha256), paths), strict=True))
        first = {}  # digest -> the file that is decoded for all of its copies
        for path, (digest, _) in digests.items():
            if digest is not None:
                first.setdefault(digest, path)
        jobs = pool.map(_try(lambda path: perceptual_hash(open_image(path))), first.values())
        hashed = dict(zip(first, tqdm(jobs, total=len(first), desc="images", unit="file", disable=None), strict=True))
    found, broken = {}, {}
    for path, (digest, reason) in digests.items():
        phash, reason = hashed[digest] if digest is not None else (None, reason)
        if phash is None:
            broken[path] = reason
        else:
            found[path] = Fingerprint(digest, phash)
    return found, broken


def _try(function):
    """Wrap `function` to return (result, None), or (None, reason) for a file that cannot be read."""

    def tried(path):
        try:
            return function(path), None
        except (OSError, UserError) as error:
            return None, str(error)

    return tried


def _images(samples_by_split: Mapping[str, Iterable[dict]]) -> dict[str, list[str]]:
    """Split -> its distinct image paths, in order of appearance."""
    return {
        split: list(dict.fromkeys(path for sample in samples for path in image_paths(sample)))
        for split, samples in samples_by_split.items()
    }


def find_identical(samples_by_split: Mapping[str, Iterable[dict]], image_root) -> list[list[tuple[str, str]]]:
    """Groups of files with the same bytes in more than one split, as [(split, image), ...].

    Only files whose size occurs in several splits are read, so the usual answer (none) costs little.
    """
    by_size = defaultdict(list)
    for split, images in _images(samples_by_split).items():
        for image in images:
            try:
                by_size[os.stat(image_path(image_root, image)).st_size].append((split, image))
            except OSError as error:
                raise UserError(f"{split} image {image}: {error.strerror} (image_root: {image_root})") from None
    by_content = defaultdict(list)
    for size, places in by_size.items():
        if len({split for split, _ in places}) > 1:
            for split, image in places:
                by_content[size, file_sha256(image_path(image_root, image))].append((split, image))
    return [places for places in by_content.values() if len({split for split, _ in places}) > 1]


def refuse_identical(samples_by_split: Mapping[str, Iterable[dict]], image_root) -> None:
    """Raise `UserError` when a file stands in more than one split: its scores would measure memory."""
    groups = find_identical(samples_by_split, image_root)
    if groups:
        names = first_names(" = ".join(f"{split}:{image}" for split, image in group) for group in groups)
        raise UserError(
            f"{len(groups)} image(s) stand in more than one split: {names}. "
            "Split again with prepare_data.py, which keeps identical files on one side"
        )


def find_near_identical(
    samples_by_split: Mapping[str, Iterable[dict]],
    image_root,
    max_distance: int = MAX_DISTANCE,
    hashes: Mapping[str, int] | None = None,
    within: bool = False,
) -> list[NearPair]:
    """Pairs of images in different splits whose perceptual hashes differ in at most `max_distance` of 64 bits.

    `hashes` (image path as in the samples -> hash) spares the decoding. within: those inside a split too, which another
    split of the same images could tear apart. Nearest pairs first.
    """
    images = _images(samples_by_split)
    if hashes is None:
        paths = {image: image_path(image_root, image) for names in images.values() for image in names}
        found, broken = fingerprint(list(paths.values()))
        if broken:
            raise UserError(f"{len(broken)} image(s) cannot be read: {first_names(broken)}")
        hashes = {image: found[path].phash for image, path in paths.items()}
    splits = [split for split in images if images[split]]
    values = {split: np.array([hashes[image] for image in images[split]], dtype=np.uint64) for split in splits}
    pairs = []
    for number, split_a in enumerate(splits):
        for split_b in splits[number if within else number + 1 :]:
            for start in range(0, len(values[split_a]), _ROWS_AT_ONCE):
                rows = values[split_a][start : start + _ROWS_AT_ONCE]
                distances = np.bitwise_count(rows[:, None] ^ values[split_b][None, :])  # (rows, images of split_b)
                for a, b in np.argwhere(distances <= max_distance):
                    if split_a == split_b and start + a >= b:
                        continue
                    names = (split_a, images[split_a][start + a], split_b, images[split_b][b])
                    pairs.append(NearPair(int(distances[a, b]), *names))
    return sorted(pairs, key=lambda pair: (pair.distance, pair.image_a, pair.image_b))


def across(pairs: Iterable[NearPair]) -> list[NearPair]:
    """Those whose two images are in different splits."""
    return [pair for pair in pairs if pair.split_a != pair.split_b]


def pairs_text(pairs: Sequence[NearPair], kept_together: Iterable[tuple[str, str]] = ()) -> str:
    """`near_identical.json`: a pair a line, for a human to take out those that differ and for `prepare_data.py vqa
    --keep-together` to read. kept_together: pairs that were kept together already, and should stay so."""
    lines = [
        {"images": [p.image_a, p.image_b], "splits": [p.split_a, p.split_b], "distance": p.distance} for p in pairs
    ]
    lines += [{"images": list(pair)} for pair in dict.fromkeys(kept_together)]
    return "[\n" + ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n]\n"


def side_by_side(pairs: Sequence[NearPair], image_root, how_to_keep: str | None = None) -> str:
    """One self-contained HTML page with the two images of each pair beside each other, the nearest pairs first.

    how_to_keep: what keeps a pair in one split, where a command does it; None: the files are edited by hand."""
    by_hand = (
        "Where a pair shows the same scene, move every sample of one image into the split of the other, or delete it "
        "there, in the files of the splits (train.json, val.json, test.json). Nothing is moved for you."
    )
    by_command = (
        f"Where a pair shows the same scene, both images belong in one split. {html.escape(how_to_keep or '')}. "
        "What is moved by hand in the files of the splits is undone when they are prepared again."
    )
    rows = []
    for pair in pairs[:PAIRS_SHOWN]:
        cells = "".join(
            f'<figure><img src="{thumbnail(image_path(image_root, image), THUMBNAIL_PIXELS)[0]}" alt="">'
            f"<figcaption><b>{html.escape(split)}</b> {html.escape(image)}</figcaption></figure>"
            for split, image in ((pair.split_a, pair.image_a), (pair.split_b, pair.image_b))
        )
        rows.append(f"<section><p>{pair.distance} of 64 bits differ</p><div>{cells}</div></section>")
    shown = f"the nearest {PAIRS_SHOWN:,} with their images" if len(pairs) > PAIRS_SHOWN else "nearest first"
    named = "\n".join(
        f"{pair.distance} bits: {pair.split_a} {html.escape(pair.image_a)} – {pair.split_b} {html.escape(pair.image_b)}"
        for pair in pairs[PAIRS_SHOWN:PAIRS_NAMED]
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Near-identical images across splits</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em; }}
section {{ border-top: 1px solid #ccc; padding: .5em 0 1em; }}
section p {{ margin: .3em 0; color: #555; }}
section div {{ display: flex; gap: 1em; }}
figure {{ flex: 1; min-width: 0; margin: 0; }}
img {{ max-width: 100%; height: auto; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
figcaption {{ overflow-wrap: anywhere; font-size: 13px; }}
</style>
<h1>Near-identical images across splits</h1>
<p>{len(pairs):,} pair(s), {shown}. Perceptual hashes may be close by chance: judge by eye. If a pair shows the same
scene, a score on the later split is partly memory.</p>
<h2>What to do next</h2>
<ol>
<li>Pairs that only look alike (the same instrument, an empty frame, another patient) may stay as they are.</li>
<li>{by_command if how_to_keep else by_hand}</li>
<li>Run <code>train.py --config YOUR.yaml --check</code> again: it lists the pairs that are left. Scores made before are
of other splits, so train and evaluate again.</li>
</ol>
{"".join(rows)}
{f"<h2>The next ones</h2><pre>{named}</pre>" if named else ""}
</html>
"""
