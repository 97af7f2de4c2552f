"""A click run small enough for tests: drawn screens with a button each, and a tiny model that has learnt them."""

import functools
import json
from pathlib import Path

from PIL import Image, ImageDraw

from support import configs, tiny_runs

# (width, height) of the screen, and the box of its button; aspect ratios differ, so that every placement does
SCREENS = {
    "red": ((300, 200), (200, 120, 280, 170)),
    "green": ((120, 360), (10, 40, 80, 90)),
    "blue": ((200, 200), (90, 90, 130, 110)),
}


def write_screens(folder: Path) -> list[dict]:
    """The images, and samples of all three in train.json, val.json and test.json; returns the samples."""
    folder.mkdir(parents=True)
    samples = []
    for colour, (size, box) in SCREENS.items():
        screen = Image.new("RGB", size, "#f4f4f4")
        ImageDraw.Draw(screen).rectangle(box, fill=colour)
        screen.save(folder / f"{colour}.png")
        point = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        sample = {"id": colour, "image": f"{colour}.png", "instruction": f"click the {colour} button", "point": point}
        samples.append({**sample, "bbox": list(box), "image_size": list(size), "group": colour})
    (folder / "all.json").write_text(json.dumps(samples))
    return samples


def write_config(folder: Path, model, family: str, **changes) -> Path:
    """Config of a run over the screens in `folder`, which learns them by heart."""
    settings = {
        "task": "click",
        "template": "plain",
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        "learning_rate": 1e-2,
        "train_bs": 3,
        "grad_accum": 1,
        "num_train_epochs": 40,
        "save_steps": 1000,
        "data": dict.fromkeys(("train", "val", "test"), str(folder / "all.json")),
        **changes,
    }
    values = tiny_runs.config_values(folder, model, family, **settings)
    return configs.write_values(folder / "run.yaml", values)


@functools.cache
def trained_run(model: Path, folder: Path, family: str) -> Path:
    """Train (once a session) and evaluate; returns the folder with run.yaml, out/ and results/."""
    import evaluate
    import train

    write_screens(folder)
    config = write_config(folder, model, family)
    train.main(["--config", str(config)])
    evaluate.main(["--config", str(config)])
    return folder


def click_run(tiny_models, family: str) -> Path:
    return trained_run(tiny_models[family], tiny_models.root / f"clicks-{family}", family)


def predictions(folder: Path) -> list[dict]:
    lines = (folder / "results" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
