"""What the benchmarks run on: model sizes, images, questions, and how many operations a question costs.

Everything is made on the spot from numbers; nothing is downloaded and no data set is needed.
"""

import copy
import csv
import functools
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import numpy as np
import torch
from PIL import Image

from attention import install_shared_attention, install_vision_attention, without_cudnn
from batches import Item
from config import Config, Data, Lora
from dataset import SampleEncoder
from errors import UserError
from family import Family, load_family
from forecast import Operations, meta_loss
from images import native_size
from model import (
    LANGUAGE,
    attach_lora,
    load_tokenizer,
    patch_embed_as_matrix_product,
    trainable_parameters,
)
from prepare import kvasir, stager
from recurrent import install_forks
from samples import SampleList
from toy import tiny_model

# The true sizes of Qwen3-VL-8B, as its config.json on the hub gives them.
EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 12288, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128,
    "rows": 151_936, "vision_hidden_size": 1152, "vision_intermediate_size": 4304, "vision_depth": 27,
    "vision_heads": 16, "deepstack": [8, 16, 24], "positions": 2304,
}  # fmt: skip
# Every width of the 8B divided by 16, the vocabulary too, so that a token's operations are shared out among layers and
# logits as in the 8B. Attention does not shrink with the square of the width as matrices do: the vision tower, whose
# every patch sees 2,304 others, keeps 7 of its 27 layers, which is again the 8B's share of a step's operations.
THIRTY_THREE_M = {
    "hidden_size": 256, "intermediate_size": 768, "layers": 36, "heads": 8, "kv_heads": 2, "head_dim": 32,
    "rows": 9_496, "vision_hidden_size": 72, "vision_intermediate_size": 269, "vision_depth": 7,
    "vision_heads": 2, "deepstack": [2, 4, 6], "positions": 2304,
}  # fmt: skip
TINY = THIRTY_THREE_M | {"layers": 4, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "heads": 4}
SIZES = {"8b": EIGHT_B, "33m": THIRTY_THREE_M, "tiny": TINY}
# Qwen3.5-9B, and every width of it divided by 16. Its recurrent layers' heads are fewer and smaller, four times each.
NINE_B = EIGHT_B | {
    "layers": 32, "heads": 16, "kv_heads": 4, "head_dim": 256, "rows": 248_320,
    "linear_key_heads": 16, "linear_value_heads": 32, "linear_head_dim": 128,
}  # fmt: skip
NINE_B_BY_16 = THIRTY_THREE_M | {
    "layers": 32, "heads": 4, "kv_heads": 1, "head_dim": 64, "rows": 15_520,
    "linear_key_heads": 4, "linear_value_heads": 8, "linear_head_dim": 32,
}  # fmt: skip
RECURRENT_TINY = NINE_B_BY_16 | {"layers": 4, "hidden_size": 64, "intermediate_size": 192}
SIZES_OF = {"qwen3_vl": SIZES, "qwen3_5": {"9b": NINE_B, "33m": NINE_B_BY_16, "tiny": RECURRENT_TINY}}

# Questions per image -> images, in 3,007 rows of Kvasir-VQA (352 whole images; Gautam et al. 2024, CC BY-NC 4.0).
REAL_HISTOGRAM = {3: 6, 4: 10, 5: 15, 6: 30, 7: 45, 8: 64, 9: 62, 10: 58, 11: 37, 12: 12, 13: 7, 14: 3, 15: 3}
QUESTIONS_IN_TRAINING = 41_079  # of Kvasir-VQA, 70 % of the images
EPOCHS = 3
EXP2_TRAIN_BS, EXP2_GRAD_ACCUM = 4, 8  # as in configs/exp2.yaml

_YES_NO = "no; not relevant; yes"
_COUNT = "0; 1; 2; 3; 4; 5; 6-10; 11-15; 16-20"
_PLACE = (
    "center; center-left; center-right; lower-center; lower-left; lower-right; none; upper-center; upper-left; "
    "upper-right"
)
# As Kvasir-VQA asks them, with the candidates a training split offers.
QUESTIONS = {
    "What type of procedure is the image taken from?": "capsule endoscopy; colonoscopy; gastroscopy",
    "How many polyps are in the image?": _COUNT,
    "What type of polyp is present?": "none; not relevant; paris ip; paris iia; paris is",
    "Is there a green/black box artefact?": _YES_NO,
    "Are there any instruments in the image? Check all that are present.": (
        "biopsy forceps; injection needle; metal clip; none; polyp snare; tube"
    ),
    "What is the size of the polyp?": "5-10mm; 11-20mm; <5mm; >20mm; none",
    "Is this finding easy to detect?": _YES_NO,
    "Have all polyps been removed?": _YES_NO,
    "What color is the abnormality? If more than one separate with ;": (
        "black; blue; brown; flesh; green; grey; none; orange; pink; purple; red; violet; white; yellow"
    ),
    "How many findings are present?": _COUNT,
    "Are there any anatomical landmarks in the image? Check all that are present.": (
        "cecum; ileum; none; pylorus; z-line"
    ),
    "Where in the image is the instrument?": _PLACE,
    "Is there text?": _YES_NO,
    "Where in the image is the abnormality?": _PLACE,
    "Where in the image is the anatomical landmark?": _PLACE,
    "Are there any abnormalities in the image? Check all that are present.": (
        "none; oesophagitis; polyp; short-segment barretts; ulcerative colitis"
    ),
    "How many instruments are in the image?": _COUNT,
}


# ------------------------------------------------------------------------------------------------------------- model


def write_folder(folder: Path, sizes: dict, tokenizer_from: str | None, family: str = "qwen3_vl") -> Path:
    """A model folder without weights: config.json, tokenizer and image processor files. tokenizer_from: a real
    tokenizer's folder instead of the demo's; the embedding then gets as many rows as it needs."""
    folder.mkdir(parents=True)
    token_ids = tiny_model.write_tokenizer(folder, family, tokenizer_from)
    demo_sizes = dict.fromkeys(("tie_word_embeddings", "vision_positions"), 0) | sizes
    config = tiny_model.model_config(family, token_ids, torch.float32, demo_sizes)
    rows = max(sizes["rows"], EIGHT_B["rows"] if tokenizer_from else 0)
    config["tie_word_embeddings"] = False
    config["text_config"] |= {"vocab_size": rows, "head_dim": sizes["head_dim"]}
    config["vision_config"]["num_position_embeddings"] = sizes["positions"]
    if family == "qwen3_vl":
        half = sizes["head_dim"] // 2
        side = half * 20 // 64
        config["text_config"]["rope_scaling"] = {
            "mrope_interleaved": True, "mrope_section": [half - 2 * side, side, side], "rope_type": "default"
        }  # fmt: skip
        config["vision_config"]["deepstack_visual_indexes"] = sizes["deepstack"]
    tiny_model.write_json(folder / "config.json", config)
    tiny_model.write_processors(folder, family, 64 * 64, 16_777_216)
    return folder


def build_base(folder: Path, device: torch.device, seed: int) -> torch.nn.Module:
    """The model of a folder with random weights, built on the device, frozen: bfloat16 on CUDA, else float32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    without_cudnn()
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )
    return model.requires_grad_(False)


def operations_of(folder: Path) -> Operations:
    """Of a model folder's LoRA training."""
    config = Config("-", str(folder), "vqa", Data("-"), "-", "-", learning_rate=1e-4)
    return Operations.of(meta_loss(config, load_family(str(folder)), torch.bfloat16).model)


def adapted(base: torch.nn.Module, lora: Lora, seed: int, stock: bool) -> torch.nn.Module:
    """A copy of the base that shares its frozen weights, with an adapter that is random in both halves (a fresh one has
    B = 0, and no gradient would reach A). The same seed gives the same adapter.

    stock: as transformers and PEFT make it, without this repo's patch embedding, attention and adapter product."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    if not stock:
        patch_embed_as_matrix_product(model)
        install_vision_attention(model)
        install_shared_attention(model)
        install_forks(model)
    model = attach_lora(model, lora, [LANGUAGE], seed)
    if stock:
        for module in model.modules():
            vars(module).pop("forward", None)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.to(next(base.parameters()).device)


# -------------------------------------------------------------------------------------------------------------- data


def read_histogram(path: str | None) -> dict[int, int]:
    """Questions per image -> images, from a csv with a column `img_id`; without a path the numbers above."""
    if path is None:
        return REAL_HISTOGRAM
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or "img_id" not in rows[0]:
        raise UserError(f"--histogram {path}: needs rows with a column 'img_id'")
    return dict(sorted(Counter(Counter(row["img_id"] for row in rows).values()).items()))


def kvasir_samples(metadata: str | None, seed: int = 42) -> list[dict]:
    """Training samples in stage order, as prepare_data.py arranges the rows of a Kvasir-VQA metadata.csv, all of which
    are trained on here; their images need not be there. Without a path: drawn rows with `REAL_HISTOGRAM`."""
    if metadata is None:
        generator, rows = random.Random(seed), []
        counts = [count for count, images in REAL_HISTOGRAM.items() for _ in range(images)]
        for number, count in enumerate(counts):
            for question in generator.sample(sorted(QUESTIONS), count):
                answer = generator.choice(QUESTIONS[question].split("; "))
                rows.append({"img_id": str(number), "question": question, "answer": answer, "source": "drawn"})
    else:
        try:
            with open(metadata, newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        except OSError as error:
            raise UserError(f"--metadata {metadata}: cannot be read ({error.strerror})") from None
        if not rows or not {"img_id", "question", "answer", "source"} <= rows[0].keys():
            raise UserError(f"--metadata {metadata}: needs rows with the columns source, question, answer, img_id")
    kept, _ = kvasir.clean([{**row, "row": number} for number, row in enumerate(rows, 1)])
    stages = {row["question"]: stager.stage_by_rules(row["question"]) for row in kept}
    groups = {row["img_id"]: row["img_id"] for row in kept}
    described = kvasir.describe_questions(kept, dict.fromkeys(groups, "train"))
    samples = kvasir.to_samples(kept, groups, groups, stages, described)
    return kvasir.arrange(samples, dict.fromkeys(groups, "train"), "stages", seed)["train"]


def questions_of_step(questions_per_image: str, histogram: dict[int, int], images: int) -> list[int]:
    """Questions of each image of one optimizer step. 'real': the middles of `images` equal parts of the histogram,
    so that every step has the whole's mean, and rows of unequal length as the whole has."""
    if questions_per_image != "real":
        return [int(questions_per_image)] * images
    counts = [count for count, many in sorted(histogram.items()) for _ in range(many)]
    return [counts[int((part + 0.5) / images * len(counts))] for part in range(images)]


def image_size(image_tokens: int, factor: int) -> tuple[int, int]:
    """(width, height) in pixels of the squarest image with exactly so many image tokens."""
    rows = max(n for n in range(1, int(image_tokens**0.5) + 1) if image_tokens % n == 0)
    size = (image_tokens // rows * factor, rows * factor)
    if native_size(*size, factor, 64 * 64, 16_777_216) != size:
        raise UserError(
            f"--image-tokens {image_tokens}: no image that the family leaves as it is has so many; try 576 or 2040"
        )
    return size


def write_images(folder: Path, count: int, size: tuple[int, int], seed: int) -> list[str]:
    """The names of as many drawn JPEG files, (width, height) pixels each."""
    generator, names = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        names.append(f"{size[0]}x{size[1]}-{number}.jpg")
        coarse = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / names[-1], quality=90)
    return names


def write_samples(folder: Path, per_step: list[int], steps: int, size: tuple[int, int], seed: int) -> list[dict]:
    """Images and the questions on them, those of an image side by side; `steps` steps of fresh images."""
    generator, samples = np.random.default_rng(seed), []
    texts = list(QUESTIONS)
    for name, count in zip(write_images(folder, steps * len(per_step), size, seed), per_step * steps, strict=True):
        for index in generator.permutation(len(texts))[:count]:
            candidates = QUESTIONS[texts[index]].split("; ")
            answer = candidates[int(generator.integers(len(candidates)))]
            samples.append(
                {"id": f"{name}-{index}", "image": name, "question": texts[index], "answer": answer}
                | {"candidates": candidates}
            )
    return samples


@dataclass(frozen=True)
class Workload:
    """One setting of the table: the questions of its steps and what lays them out."""

    config: Config
    family: Family
    encoder: SampleEncoder
    samples: SampleList
    questions: int  # per optimizer step
    steps: int  # of the samples

    @functools.cached_property
    def items(self) -> list[Item]:
        """Its questions, tokenised."""
        sizes = functools.cache(self.encoder.size_only)
        return [self.encoder.encode(s, [sizes(path) for path in self.encoder.images_of(s)]) for s in self.samples]


def make_workload(
    model_folder: Path, root: Path, per_step: list[int], image_tokens: int, steps: int, lora: Lora, seed: int
) -> Workload:
    """steps: so many optimizer steps of fresh images. per_step: questions of each image of a step."""
    size = image_size(image_tokens, load_family(str(model_folder)).factor)
    return _workload(model_folder, root, write_samples(root, per_step, steps, size, seed), 1, sum(per_step), lora, seed)


def exp2_workload(
    model_folder: Path, root: Path, metadata: str | None, image_tokens: int, steps: int, lora: Lora, seed: int
) -> Workload:
    """Steps of exp2 as it is shipped, on one GPU: consecutive questions in stage order, from all over the file."""
    ordered, questions = kvasir_samples(metadata), EXP2_TRAIN_BS * EXP2_GRAD_ACCUM
    starts = [int((part + 0.5) / steps * (len(ordered) - questions)) for part in range(steps)]
    chosen = [sample for start in starts for sample in ordered[start : start + questions]]
    size = image_size(image_tokens, load_family(str(model_folder)).factor)
    names = dict.fromkeys(sample["image"] for sample in chosen)
    drawn = dict(zip(names, write_images(root, len(names), size, seed), strict=True))
    samples = [{**sample, "image": drawn[sample["image"]]} for sample in chosen]
    return _workload(model_folder, root, samples, EXP2_TRAIN_BS, EXP2_GRAD_ACCUM, lora, seed)


def _workload(model_folder: Path, root: Path, samples: list[dict], train_bs: int, grad_accum: int, lora: Lora, seed):
    config = Config(
        experiment="BENCHMARK", model_name=str(model_folder), task="vqa", data=Data(train="-", image_root=str(root)),
        output_dir="-", results_dir="-", learning_rate=1e-4, template="ultra_condensed", resize="native", lora=lora,
        train_bs=train_bs, grad_accum=grad_accum, max_tokens=16_384, seed=seed, dataloader_num_workers=1,
    )  # fmt: skip
    family = load_family(str(model_folder))
    encoder = SampleEncoder(config, family, load_tokenizer(str(model_folder)))
    questions = train_bs * grad_accum
    return Workload(config, family, encoder, SampleList(samples, "benchmark"), questions, len(samples) // questions)


# --------------------------------------------------------------------------------------------------------------- rate


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product on this machine: bfloat16 on CUDA, on CPU float32 in CPU time,
    which other processes do not disturb."""
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    clock, best = time.perf_counter if on_gpu else time.process_time, 0.0
    for _ in range(10):
        if on_gpu:
            torch.cuda.synchronize()
        began = clock()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (clock() - began))
    return best
