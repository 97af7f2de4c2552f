"""Everything that can be wrong with a run and its data, found before a GPU is touched.

`check_samples` is quick and runs before every training; `full_check` is `train.py --check` and decodes every image.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from dataset import BatchPlan, SampleEncoder
from errors import UserError, first_names
from family import Family, load_family
from files import refuse_unusable_folder, write_text
from forecast import STEPS_LOOKED_AT, forecast, meta_loss
from images import image_path, open_image, refuse_outside, unpatchify
from model import load_tokenizer, parameter_table
from recurrent import refuse_deterministic
from report.metrics import answer_outside_candidates
from runlog import on_terminal
from samples import SampleList
from tasks import check_record, counted, task_of
from templates import IGNORE, image_paths, refuse_answers

SHOWN = 10  # problems printed one by one; the rest is counted
MANY_SAMPLES = 50_000  # to be looked at for more than a few seconds
TEMPLATE_TOKENS = 300  # more than any template adds to a sample's own text
SAMPLES_RENDERED = 32  # at most, for the hash of the prompt
END_BYTES = 4096  # at either end of an image file, for the hash of the images
FILES_AT_ONCE = 10_000
BYTES_PER_TOKEN = 4  # of a usual text, to tell which sample is the longest
# The keys of a config that decide whether a sample can be used, beside image_root.
SURVEYED_SETTINGS = "task template image image_size resize max_pixels max_tokens num_labels".split()


def open_encoder(config: Config, source: str, trained_in=None) -> SampleEncoder:
    """What turns samples into tokens for a config, as in training; its family and tokenizer are read, no weights.

    source: what messages call the config. trained_in: a folder of weights that were trained before, if any.
    Raises: `UserError` where the image size does not fit the family, the weights were trained under other settings, or
    this machine cannot compute so.
    """
    family = load_family(config.model_name)
    if family.has_vision and config.resize == "letterbox":
        family.check_image_size(config.image_size, source)
    check_record(trained_in, family, config)
    refuse_deterministic(family, config.deterministic)
    return SampleEncoder(config, family, load_tokenizer(config.model_name))


def check_samples(samples: SampleList, encoder: SampleEncoder) -> None:
    """Raises: `UserError` with the number of bad samples and the first ten."""
    report_problems(sample_problems(samples, encoder), SHOWN)


def sample_problems(samples: SampleList, encoder: SampleEncoder) -> list[str]:
    """A line for each sample that makes no conversation, exceeds max_tokens, or has an image outside image_root. Prints
    how many documents lose their end to max_tokens."""
    found = survey(samples, encoder)
    if found["cut_texts"]:
        print(
            f"{samples.source}: {found['cut_texts']:,} of {len(samples):,} texts are longer than max_tokens and are "
            f"cut at the end, by {found['cut_tokens']:,} tokens in the median",
            flush=True,
        )
    return found["problems"]


def missing_candidates(samples: SampleList, encoder: SampleEncoder) -> list[str]:
    """A line that counts the samples whose candidate list lacks their own answer; no line where there is none."""
    count = survey(samples, encoder)["outside_candidates"]
    return [f"WARNING: {count:,} answers of {samples.source} are not in their own candidate list"] if count else []


def survey(samples: SampleList, encoder: SampleEncoder) -> dict:
    """What one look at every sample of a split tells; of a cached split without problems it is kept, and looked up
    where samples, settings, tokenizer and this code are the same. (An image that is replaced later is met when it is
    read.)

    Returns: problems (a line for each sample that cannot be used), cut_texts (how many documents max_tokens cuts) and
    cut_tokens (the median of what they lose), outside_candidates (answers that their own candidate list lacks), longest
    (the row with the most tokens)."""
    settings = {name: getattr(encoder.config, name) for name in SURVEYED_SETTINGS}
    settings |= {"image_root": os.path.abspath(encoder.config.data.image_root), "family": asdict(encoder.family)}
    settings |= {"tokenizer": encoder.tokenizer_sha256, "code": _code_sha256()}
    return samples.remembered("survey", settings, lambda: _survey(samples, encoder))


def _survey(samples: SampleList, encoder: SampleEncoder) -> dict:
    """Quick: no text has more tokens than bytes, and an image's tokens follow from its file's header, so that only
    samples that might not fit are tokenised, and only headers are read that might make a sample the longest."""
    config, family = encoder.config, encoder.family
    most_tokens = 0
    if family.has_vision:
        pixels = config.image_size**2 if config.resize == "letterbox" else config.max_pixels or family.max_pixels
        most_tokens = pixels // family.factor**2
    tokens_of: dict[str, int] = {}  # image -> its tokens
    placement_of = functools.lru_cache(maxsize=None)(encoder.placement)
    problems, cut, outside_candidates, longest = [], [], 0, (0, 0)
    if len(samples) >= MANY_SAMPLES:
        print(f"Checking {len(samples):,} samples of {samples.source}", flush=True)
    for row, sample in enumerate(tqdm(samples, "samples", disable=not on_terminal(), leave=False)):
        try:
            paths = encoder.images_of(sample)
            for path in paths:
                refuse_outside(config.data.image_root, path)
            # The size that a click states is checked now, or a worker meets it in the middle of the run.
            placement = placement_of(paths[0]) if encoder.task.POINTS and paths else None
            messages, _ = encoder.task.prompt(sample, encoder, len(paths), placement)
            refuse_answers(messages, encoder.tokenizer)
            outside_candidates += sum(map(_is_outside_candidates, sample.get("turns", [sample])))
            text = sum(len(str(message["content"]).encode()) for message in messages) + TEMPLATE_TOKENS
            images = len(paths) * most_tokens
            if text + images > config.max_tokens or (
                config.resize == "native" and text // BYTES_PER_TOKEN + images > longest[0]
            ):
                for path in paths:
                    if path not in tokens_of:
                        height, width = encoder.size_only(path).grid
                        tokens_of[path] = height * width // max(1, family.merge_size**2)
                images = sum(tokens_of[path] for path in paths)
            if text + images > config.max_tokens:
                item = encoder.encode(sample, [encoder.size_only(path) for path in paths])
                cut += [item.cut_tokens] * bool(item.cut_tokens)
            longest = max(longest, (text // BYTES_PER_TOKEN + images, -row))
        except UserError as error:
            problems.append(f"{samples.name(row)}: {error}")
    return {
        "problems": problems,
        "cut_texts": len(cut),
        "cut_tokens": sorted(cut)[len(cut) // 2] if cut else 0,
        "outside_candidates": outside_candidates,
        "longest": -longest[1],
    }


def _is_outside_candidates(turn: dict) -> bool:
    return (
        "answer" in turn
        and isinstance(turn.get("candidates"), list)
        and bool(answer_outside_candidates(turn, "answer"))
    )


@functools.cache
def _code_sha256() -> str:
    """Of this repo's Python files that a survey may pass through: after an edit every sample is looked at again."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.glob("tasks/*.py"), *here.glob("report/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def input_hashes(samples: SampleList, encoder: SampleEncoder) -> dict[str, str]:
    """SHA-256 of what a resumed run must see as before: `images`, the files that the samples show, and `prompt`, some
    samples as the model reads them.

    Of an image file, its size and its two ends count. Times would refuse a data set that was copied, and to read all
    of a million files takes an hour. In a compressed file every pixel moves the end; the middle of an uncompressed one
    could change unnoticed.
    Raises: `UserError` where an image cannot be read.
    """
    root = encoder.config.data.image_root
    paths = sorted({path for sample in samples.one_of_each_image() for path in encoder.images_of(sample)})
    images, prompt = hashlib.sha256(), hashlib.sha256()
    with ThreadPoolExecutor(16) as threads:  # they wait for the disk
        for start in range(0, len(paths), FILES_AT_ONCE):
            some = paths[start : start + FILES_AT_ONCE]
            for path, ends in zip(some, threads.map(_size_and_ends, [image_path(root, p) for p in some]), strict=True):
                images.update(f"{path}\0".encode() + ends)
    for row in range(0, len(samples), -(-len(samples) // SAMPLES_RENDERED)):
        shown = [encoder.size_only(path) for path in encoder.images_of(samples[row])]
        item = encoder.encode(samples[row], shown)
        prompt.update(item.input_ids.tobytes() + item.labels.tobytes() + str(item.class_label).encode())
    return {"images": images.hexdigest(), "prompt": prompt.hexdigest()}


def _size_and_ends(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            first, size = file.read(END_BYTES), os.fstat(file.fileno()).st_size
            file.seek(max(0, size - END_BYTES))
            return b"%d\0" % size + first + file.read()
    except OSError as error:
        raise UserError(f"image {path}: {error.strerror}; correct the path or data.image_root") from None


def check_input_hashes(folder: Path, recorded: Mapping[str, str], found: Mapping[str, str], config: Config) -> None:
    """Raises: `UserError` where a run that goes on from a checkpoint would see other images or prompts than before."""
    names = {
        "images": f"image files of data.train in {config.data.image_root}",
        "prompt": "the prompt (templates.py, or the model's tokenizer or chat template)",
        "order": f"the order that is drawn for order '{config.order}' and seed {config.seed} (batches.py, or numpy)",
    }
    # Other images may have another number of tokens. Older checkpoints have no record, and shuffled in another way.
    if config.order != "sequential":
        recorded = {"order": "", **recorded}
    changed = next((names[key] for key in names if recorded.get(key, found.get(key)) != found.get(key)), None)
    if changed:
        raise UserError(
            f"{changed} changed since {folder} was saved; set this back, or choose a new output_dir for the new "
            "experiment"
        )


def report_problems(problems: list[str], shown: int) -> None:
    """Raises: `UserError` that counts them and lists the first ones."""
    if problems:
        more = f"\n  ... and {len(problems) - shown} more" if len(problems) > shown else ""
        listed = problems[0] if len(problems) == 1 else "\n  " + "\n  ".join(problems[:shown])
        count = "" if len(problems) == 1 else f"{len(problems)} samples cannot be used:"
        raise UserError(f"{count}{listed}{more}")


def full_check(
    config: Config, splits: Mapping[str, SampleList], encoder: SampleEncoder, world_size: int, tflops: float
) -> None:
    """`--check`: decode every image, look for leaks between splits, show a sample, count parameters and steps, and say
    what the run will need. tflops: see `forecast.forecast`."""
    refuse_unusable_folder(Path(config.output_dir), "output_dir")
    problems = []
    for name, samples in splits.items():
        print(f"{name}: {len(samples):,} samples in {samples.source}", flush=True)
        problems += sample_problems(samples, encoder) + undecodable(samples, encoder, name)
    report_problems(list(dict.fromkeys(problems)), shown=1000)
    if encoder.family.has_vision:
        print("\n".join(["Every image decodes.", *enlarged_by_the_processor(config, encoder.family)]), flush=True)
    check_leakage(config, splits)
    print("".join(f"{line}\n" for line in missing_candidates(splits["train"], encoder)), end="")
    show_sample(splits["train"][0], encoder)
    print("\n".join(["Parameters:", *count_parameters(config)]))
    plan = make_plan(config, splits["train"], encoder, world_size)
    print("\n".join(batch_arithmetic(config, plan, world_size)))
    print("\n".join(prefix_sharing(config, plan, splits["train"], encoder)))
    longest = survey(splits["train"], encoder)["longest"]
    print("\n".join(forecast(config, splits, longest, encoder, plan, world_size, tflops)))
    print("Check passed: nothing was trained.", flush=True)


def enlarged_by_the_processor(config: Config, family: Family) -> list[str]:
    """A warning where training shows images smaller than the model's own image processor would."""
    key = "image_size" if config.resize == "letterbox" else "max_pixels"
    value = getattr(config, key) or family.max_pixels
    pixels, fits = (value**2, family.factor) if key == "image_size" else (value, family.min_pixels)
    if pixels >= family.min_pixels or task_of(config).HAS_HEAD:  # classifiers are not merged
        return []
    while key == "image_size" and fits**2 < family.min_pixels:
        fits += family.factor
    most = "at most " if key == "max_pixels" else ""  # a letterbox makes just as many
    return [
        f"WARNING: {key} {value} shows images of {most}{pixels:,} pixels, and the model's own image processor "
        f"enlarges those below {family.min_pixels:,}: a server would show the model other images than training does, "
        f"so merge.py refuses such a run; set {key}: {fits} or more"
    ]


def refuse_leakage(config: Config, splits: Mapping[str, SampleList]) -> dict[str, SampleList]:
    """Raises: `UserError` where an image file, or a document, stands in two splits. Returns the splits that were
    compared: a file given for two splits on purpose, to see a model memorise, is not compared with itself."""
    import leakage

    compared = dict({samples.source: (name, samples) for name, samples in splits.items()}.values())
    if not task_of(config).HAS_HEAD:
        shown = {name: samples.one_of_each_image() for name, samples in compared.items()}
        if config.data.shared_images == "allowed":
            groups = leakage.find_identical(shown, config.data.image_root)
            told = f"{len(groups):,} image(s) stand in more than one split, as data.shared_images allows"
            print(f"WARNING: {told}: scores on them measure memory as well as skill", flush=True)
        else:
            leakage.refuse_identical(shown, config.data.image_root)
        return compared
    refuse_same_texts(compared)
    # Blank pages and title pages of proceedings may be alike; the first page is the paper's.
    first_pages = {
        name: [{"images": image_paths(sample)[:1]} for sample in samples] for name, samples in compared.items()
    }
    leakage.refuse_identical(first_pages, config.data.image_root)
    return compared


def refuse_same_texts(splits: Mapping[str, SampleList]) -> None:
    """Raises: `UserError` where two splits hold a document of the same words."""
    first: dict[str, tuple[str, int]] = {}
    found = []
    for split, samples in splits.items():
        for row in range(len(samples)):
            words = " ".join(str(samples[row].get("text") or "").casefold().split())
            other, other_row = first.setdefault(words, (split, row))
            if words and other != split:
                found.append(f"{splits[other].name(other_row)} = {samples.name(row)}")
    if found:
        raise UserError(
            f"{len(found)} text(s) stand in more than one split: {first_names(found)}. "
            "Split again with prepare_data.py, which keeps them on one side"
        )


def check_leakage(config: Config, splits: Mapping[str, SampleList]) -> None:
    """Identical images in two splits are fatal; near-identical ones go to near_identical.html, for a human."""
    import leakage
    from prepare import vqa

    compared = refuse_leakage(config, splits)
    if task_of(config).HAS_HEAD:  # pages of text all look alike to a perceptual hash
        print(f"No document stands in two of {', '.join(compared)}.", flush=True)
        return
    if config.data.shared_images == "allowed":  # said already; copies are nearly identical as well
        return
    everywhere = leakage.find_near_identical(compared, config.data.image_root, within=True)
    pairs = leakage.across(everywhere)
    print(f"No image stands in two of {', '.join(compared)}; {len(pairs)} pairs look nearly alike.", flush=True)
    if pairs:
        page = Path(config.output_dir) / "near_identical.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        prepared, cure = Path(config.data.train or "").parent, None
        if config.data.train and vqa.has_prepared(prepared):
            before = prepared / vqa.PAIRS
            cure = vqa.how_to_keep(page.parent, False, before if before.is_file() else None)
        write_text(page, leakage.side_by_side(pairs, config.data.image_root, cure))
        write_text(page.with_suffix(".json"), leakage.pairs_text(everywhere))  # for prepare_data.py vqa --keep-together
        print(f"Look at them side by side in {page}", flush=True)


def undecodable(samples: SampleList, encoder: SampleEncoder, split: str) -> list[str]:
    """A line for each image of the split that cannot be decoded or resized, naming the first row that uses it."""
    first_row: dict[str, int] = {}
    for row in range(len(samples)):
        for path in encoder.images_of(samples[row]):
            first_row.setdefault(path, row)

    def try_decode(entry) -> str | None:
        path, row = entry
        try:
            image = open_image(image_path(encoder.config.data.image_root, path))
            encoder.placement(path, image.size)  # native resizing refuses strips
        except UserError as error:
            return f"{samples.name(row)}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(try_decode, first_row.items())
        bar = tqdm(found, f"decoding {split}", total=len(first_row), disable=not on_terminal(), leave=False)
        return [problem for problem in bar if problem]


def show_sample(sample: dict, encoder: SampleEncoder) -> None:
    """Print a sample as the model sees it; what is supervised stands between ⟦ and ⟧, image tokens are counted."""
    images = [encoder.load_image(path) for path in encoder.images_of(sample)]
    item = encoder.encode(sample, images)
    print(f"\nSample {item.sample_id}: {len(item.input_ids)} tokens; supervised text stands in ⟦ ⟧")
    print(marked_text(item, encoder), flush=True)
    for path, image in zip(item.images, images, strict=True):
        place = image.placement
        (width, height), (model_width, model_height) = place.original_size, place.model_size
        inside = f"content {place.content_size[0]}×{place.content_size[1]} at {place.offset}"
        print(f"Image {path}: {width}×{height} → {model_width}×{model_height} ({inside})")


def images_and_text(sample: dict, encoder: SampleEncoder) -> tuple[list, str]:
    """The sample's images as the model sees them, uint8 (height, width, 3), and its text with the label mask."""
    images = [encoder.load_image(path) for path in encoder.images_of(sample)]
    family = encoder.family
    pixels = [unpatchify(image.patches, image.grid, family.patch_size, family.merge_size) for image in images]
    return pixels, marked_text(encoder.encode(sample, images), encoder)


def marked_text(item, encoder: SampleEncoder) -> str:
    """The decoded sample with its label mask made visible."""
    tokenizer, image_token_id = encoder.tokenizer, encoder.family.image_token_id
    pieces, start = [], 0
    kind = [
        ("image" if t == image_token_id else "answer" if label != IGNORE else "prompt")
        for t, label in zip(item.input_ids, item.labels, strict=True)
    ]
    for end in range(1, len(kind) + 1):
        if end == len(kind) or kind[end] != kind[start]:
            text = tokenizer.decode(item.input_ids[start:end])
            pieces.append(
                {"image": f"[{end - start} image tokens]", "answer": f"⟦{text}⟧", "prompt": text}[kind[start]]
            )
            start = end
    return "".join(pieces)


def count_parameters(config: Config) -> list[str]:
    """The parameter table of the run's model, built without weights."""
    return parameter_table(meta_loss(config, load_family(config.model_name), torch.float32).model)


def make_plan(config: Config, samples: SampleList, encoder: SampleEncoder, world_size: int) -> BatchPlan:
    """Raises: `UserError` where the ranks could not train these samples together."""
    if config.parallel == "fsdp" and encoder.image_shown and world_size > 1:
        shown = samples.image_keys < 0
        if shown.any() and not shown.all():
            raise UserError(
                f"{samples.name(int(shown.argmin()))} has no image and others have: under parallel 'fsdp' all ranks "
                "gather the vision tower at the same time, or none; set parallel: ddp, or train the two apart"
            )
    image_of = None
    if config.order == "images":
        image_of = samples.image_keys if encoder.image_shown else np.arange(len(samples))
    batch = config.train_bs * config.grad_accum * world_size
    return BatchPlan(len(samples), batch, config.num_train_epochs, config.order, config.seed, image_of)


def batch_arithmetic(config: Config, plan: BatchPlan, world_size: int, pass_tokens: int | None = None) -> list[str]:
    passes = f", in passes of up to {pass_tokens:,} tokens" if pass_tokens else ""
    warnings, unit = [], counted(config)
    if config.warmup_steps >= plan.total_steps:
        warnings.append(
            f"WARNING: warmup_steps is {config.warmup_steps} and the run has {plan.total_steps:,} steps: it ends "
            "before learning_rate is reached"
        )
    return [
        f"Batch: train_bs {config.train_bs} × grad_accum {config.grad_accum} × {world_size} ranks = {plan.batch} "
        f"{unit} a step{passes}",
        f"Steps: {plan.samples:,} {unit} / {plan.batch} = {plan.steps_per_epoch:,} an epoch, "
        f"{config.num_train_epochs:g} epochs = {plan.total_steps:,} steps over {plan.total_questions:,} {unit}",
        *warnings,
    ]


def prefix_sharing(config: Config, plan: BatchPlan, samples: SampleList, encoder: SampleEncoder) -> list[str]:
    """How many image prefixes a step's questions lie behind, as counted in some of the first epoch's steps."""
    if not (config.share_prefix and encoder.image_shown):
        return []
    questions, prefixes = 0, 0
    steps = min(plan.steps_per_epoch, plan.total_steps)
    looked_at = {steps * part // STEPS_LOOKED_AT for part in range(STEPS_LOOKED_AT)}
    for step in looked_at:
        rows = plan.questions(step)
        questions += len(rows)
        prefixes += len({encoder.images_of(samples[row]) or int(row) for row in rows})
    if prefixes == questions:
        return []
    per_step = [count / len(looked_at) for count in (questions, prefixes)]
    return [f"Sharing: a step's {per_step[0]:.0f} {counted(config)} lie behind {per_step[1]:.1f} image prefixes"]


def describe_images(config: Config, family: Family) -> str:
    if not family.has_vision:
        return "✓ Text only"
    if config.resize == "letterbox":
        return f"✓ Letterbox mode enabled: {config.image_size}×{config.image_size}"
    return f"✓ Native resolution enabled: up to {config.max_pixels or family.max_pixels:,} pixels"
