"""Everything that can be wrong with a run and its data, found before a GPU is touched.

`check_samples` is quick and runs before every training; `full_check` is `train.py --check` and decodes every image.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from counting import meta_loss
from dataset import BatchPlan, SampleEncoder, SampleList
from errors import UserError, first_names
from family import Family, load_family
from forecast import forecast
from images import ModelImage, image_path, open_image, unpatchify
from model import load_tokenizer, parameter_table
from report.metrics import answer_outside_candidates
from runlog import on_terminal
from tasks import check_record, task_of
from templates import IGNORE, image_paths

SHOWN = 10  # problems printed one by one; the rest is counted
MANY_SAMPLES = 50_000  # to be looked at for more than a few seconds
TEMPLATE_TOKENS = 300  # more than any template adds to a sample's own text
STEPS_LOOKED_AT = 20  # by `prefix_sharing`


def open_encoder(config: Config, source: str, trained_in=None) -> SampleEncoder:
    """What turns samples into tokens for a config, as in training; its family and tokenizer are read, no weights.

    source: what messages call the config. trained_in: a folder of weights that were trained before, if any.
    Raises: `UserError` where the image size does not fit the family, or the weights were trained under other settings.
    """
    family = load_family(config.model_name)
    if family.has_vision and config.resize == "letterbox":
        family.check_image_size(config.image_size, source)
    check_record(trained_in, family, config)
    return SampleEncoder(config, family, load_tokenizer(config.model_name))


def check_samples(samples: SampleList, encoder: SampleEncoder) -> None:
    """Errors: `UserError` with the number of bad samples and the first ten."""
    report_problems(sample_problems(samples, encoder), SHOWN)


def sample_problems(samples: SampleList, encoder: SampleEncoder) -> list[str]:
    """A line for each sample that makes no conversation, exceeds max_tokens, or has an image outside image_root.

    Quick: no text has more tokens than bytes, and an image's tokens follow from its file's header, so that only samples
    that might not fit are tokenised. Prints how many documents lose their end to max_tokens.
    """
    config, family = encoder.config, encoder.family
    most_tokens = 0
    if family.has_vision:
        pixels = config.image_size**2 if config.resize == "letterbox" else config.max_pixels or family.max_pixels
        most_tokens = pixels // family.factor**2
    sizes: dict[str, ModelImage] = {}
    problems, cut = [], []
    if len(samples) >= MANY_SAMPLES:
        print(f"Checking {len(samples):,} samples of {samples.source}", flush=True)
    for row in tqdm(range(len(samples)), "samples", disable=not on_terminal(), leave=False):
        sample = samples[row]
        try:
            paths = encoder.images_of(sample)
            for path in paths:
                image_path(config.data.image_root, path)
            messages, _ = encoder.task.prompt(sample, encoder, len(paths))
            length = sum(len(str(message["content"]).encode()) for message in messages) + TEMPLATE_TOKENS
            if length + len(paths) * most_tokens <= config.max_tokens:
                continue
            for path in paths:
                if path not in sizes:
                    sizes[path] = encoder.size_only(path)
            images = [sizes[path] for path in paths]
            tokens = sum(image.grid[0] * image.grid[1] for image in images) // max(1, family.merge_size**2)
            if length + tokens > config.max_tokens:
                item = encoder.encode(sample, images)
                cut += [item.cut_tokens] * bool(item.cut_tokens)
        except UserError as error:
            problems.append(f"{samples.name(row)}: {error}")
    if cut:
        print(
            f"{samples.source}: {len(cut):,} of {len(samples):,} texts are longer than max_tokens and are cut at the "
            f"end, by {sorted(cut)[len(cut) // 2]:,} tokens in the median",
            flush=True,
        )
    return problems


def missing_candidates(samples: SampleList) -> list[str]:
    """A line that counts the samples whose candidate list lacks their own answer; no line where there is none."""
    turns = (turn for sample in samples for turn in sample.get("turns", [sample]))
    listed = (turn for turn in turns if "answer" in turn and isinstance(turn.get("candidates"), list))
    count = sum(answer_outside_candidates(turn, "answer") for turn in listed)
    return [f"WARNING: {count:,} answers of {samples.source} are not in their own candidate list"] if count else []


def report_problems(problems: list[str], shown: int) -> None:
    """Errors: `UserError` that counts them and lists the first ones."""
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
    problems = []
    for name, samples in splits.items():
        print(f"{name}: {len(samples):,} samples in {samples.source}", flush=True)
        problems += sample_problems(samples, encoder) + undecodable(samples, encoder, name)
    report_problems(list(dict.fromkeys(problems)), shown=1000)
    if encoder.family.has_vision:
        print("Every image decodes.", flush=True)
    check_leakage(config, splits)
    print("".join(f"{line}\n" for line in missing_candidates(splits["train"])), end="")
    show_sample(splits["train"][0], encoder)
    print("\n".join(["Parameters:", *count_parameters(config)]))
    plan = make_plan(config, splits["train"], encoder, world_size)
    print("\n".join(batch_arithmetic(config, plan, world_size)))
    print("\n".join(prefix_sharing(config, plan, splits["train"], encoder)))
    print("\n".join(forecast(config, splits, encoder, plan, world_size, tflops)))
    print("Check passed: nothing was trained.", flush=True)


def refuse_leakage(config: Config, splits: Mapping[str, SampleList]) -> dict[str, SampleList]:
    """Errors: `UserError` where an image file, or a document, stands in two splits. Returns the splits that were
    compared: a file given for two splits on purpose, to see a model memorise, is not compared with itself."""
    import leakage

    compared = dict({samples.source: (name, samples) for name, samples in splits.items()}.values())
    if not task_of(config).HAS_HEAD:
        leakage.refuse_identical(compared, config.data.image_root)
        return compared
    refuse_same_texts(compared)
    # Blank pages and title pages of proceedings may be alike; the first page is the paper's.
    first_pages = {
        name: [{"images": image_paths(sample)[:1]} for sample in samples] for name, samples in compared.items()
    }
    leakage.refuse_identical(first_pages, config.data.image_root)
    return compared


def refuse_same_texts(splits: Mapping[str, SampleList]) -> None:
    """Errors: `UserError` where two splits hold a document of the same words."""
    first: dict[str, tuple[str, str]] = {}
    found = []
    for split, samples in splits.items():
        for row in range(len(samples)):
            words = " ".join(str(samples[row].get("text") or "").casefold().split())
            other, name = first.setdefault(words, (split, samples.name(row)))
            if words and other != split:
                found.append(f"{name} = {samples.name(row)}")
    if found:
        raise UserError(
            f"{len(found)} text(s) stand in more than one split: {first_names(found)}. "
            "Split again with prepare_data.py, which keeps them on one side"
        )


def check_leakage(config: Config, splits: Mapping[str, SampleList]) -> None:
    """Identical images in two splits are fatal; near-identical ones go to near_identical.html, for a human."""
    import leakage

    compared = refuse_leakage(config, splits)
    if task_of(config).HAS_HEAD:  # pages of text all look alike to a perceptual hash
        print(f"No document stands in two of {', '.join(compared)}.", flush=True)
        return
    pairs = leakage.find_near_identical(compared, config.data.image_root)
    print(f"No image stands in two of {', '.join(compared)}; {len(pairs)} pairs look nearly alike.", flush=True)
    if pairs:
        page = Path(config.output_dir) / "near_identical.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(leakage.side_by_side(pairs, config.data.image_root), encoding="utf-8")
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
    """Errors: `UserError` where the ranks could not train these samples together."""
    if config.parallel == "fsdp" and encoder.image_shown and world_size > 1:
        shown = [bool(encoder.images_of(sample)) for sample in samples]
        if any(shown) and not all(shown):
            raise UserError(
                f"{samples.name(shown.index(False))} has no image and others have: under parallel 'fsdp' all ranks "
                "put the vision tower together at the same time, or none; set parallel: ddp, or train the two apart"
            )
    image_of = None
    if config.order == "images":
        image_of = [encoder.images_of(samples[row]) or row for row in range(len(samples))]
    batch = config.train_bs * config.grad_accum * world_size
    return BatchPlan(len(samples), batch, config.num_train_epochs, config.order, config.seed, image_of)


def batch_arithmetic(config: Config, plan: BatchPlan, world_size: int, pass_tokens: int | None = None) -> list[str]:
    passes = f", in passes of up to {pass_tokens:,} tokens" if pass_tokens else ""
    warnings = []
    if config.warmup_steps >= plan.total_steps:
        warnings.append(
            f"Warning: warmup_steps is {config.warmup_steps} and the run has {plan.total_steps:,} steps: it ends "
            "before learning_rate is reached"
        )
    return [
        f"Batch: train_bs {config.train_bs} × grad_accum {config.grad_accum} × {world_size} ranks = {plan.batch} "
        f"questions a step{passes}",
        f"Steps: {plan.samples:,} questions / {plan.batch} = {plan.steps_per_epoch:,} an epoch, "
        f"{config.num_train_epochs:g} epochs = {plan.total_steps:,} steps over {plan.total_questions:,} questions",
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
    return ["Sharing: a step's {:.0f} questions lie behind {:.1f} image prefixes".format(*per_step)]


def describe_images(config: Config, family: Family) -> str:
    if not family.has_vision:
        return "✓ Text only"
    if config.resize == "letterbox":
        return f"✓ Letterbox mode enabled: {config.image_size}×{config.image_size}"
    return f"✓ Native resolution enabled: up to {config.max_pixels or family.max_pixels:,} pixels"
