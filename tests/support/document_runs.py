"""Small classification runs for tests: texts with the label's word in them, pages with the label drawn on them."""

import json
import random

from PIL import Image, ImageDraw

from support import configs
from support.run_helpers import log_rows

WORDS = "the and of to in is it that for on with as was paper title small number".split()
LABEL_WORDS = ("reject", "accept")
COLOURS = ("#c02020", "#2040c0")
IMAGE_SIZE = {"qwen2_vl": 56, "qwen2_5_vl": 56, "qwen3_vl": 64, "qwen3_5": 64}


def write_documents(folder, train=96, val=24, test=24):
    """text_SPLIT.json and page_SPLIT.json in the folder: the same ids and labels, the page samples with two pages each,
    of which the second one shows the label's colour."""
    generator = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val), ("test", test)):
        texts, pages = [], []
        for number in range(count):
            label, name = number % 2, f"{split}-{number}"
            words = generator.choices(WORDS, k=generator.randint(4, 16))
            words.insert(generator.randint(0, len(words)), LABEL_WORDS[label])
            facts = {"id": name, "label": label, "note": f"note {number}"}
            texts.append({**facts, "text": f"{name} {' '.join(words)}"})
            pages.append({**facts, "images": [f"{name}-1.png", f"{name}-2.png"]})
            for page in (1, 2):
                image = Image.new("RGB", (60, 80), "white")
                draw = ImageDraw.Draw(image)
                for y in range(6, 74, 8):
                    draw.line((5, y, 5 + generator.randint(15, 50), y), fill="black")
                if page == 2:
                    draw.rectangle((4, 28, 56, 76), fill=COLOURS[label])
                image.save(folder / f"{name}-{page}.png")
        (folder / f"text_{split}.json").write_text(json.dumps(texts))
        (folder / f"page_{split}.json").write_text(json.dumps(pages))
    return folder


def document_config(documents, model, output, kind="text", family="qwen2", **changes):
    """A config of the documents; returns its path. kind: text or page."""
    defaults = {
        "task": "cls",
        "template": None,
        "num_labels": 2,
        "finetuning": "full",
        "data": {split: str(documents / f"{kind}_{split}.json") for split in ("train", "val", "test")},
        "learning_rate": 3e-3,
        "backbone_learning_rate": 2e-3,
        "max_tokens": 512,
        "train_bs": 4,
        "num_train_epochs": 1,
        "warmup_steps": 2,
        "order": "random",
        "logging_steps": 1,
        "eval_steps": "epoch",
        "save_steps": "epoch",
        "image_size": IMAGE_SIZE[family] if kind == "page" else None,
    }
    values = configs.config_values(documents, model, output, **{**defaults, **changes})
    return configs.write_values(output.parent / f"{output.name}.yaml", values)


def losses(output):
    return [row["loss"] for row in log_rows(output)]


def predictions(results):
    return [json.loads(line) for line in (results / "generated_predictions.jsonl").read_text().splitlines()]
