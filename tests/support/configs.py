"""The one writer of the tests' configs. Each kind of data adds what it needs to the values of a small run."""

from pathlib import Path

import yaml

# of the drawn screens and noise images, in pixels a side: 16 image tokens each
IMAGE_SIZE = {"qwen2_vl": 112, "qwen2_5_vl": 112, "qwen3_vl": 128, "qwen3_5": 128}


def config_values(folder, model, output, **changes) -> dict:
    """The values of a small run on the images in `folder`. A changed dict is merged into the one here; None drops a
    key."""
    values = {
        "experiment": "A SMALL RUN",
        "model_name": str(model),
        "task": "vqa",
        "template": "ultra_condensed",
        "data": {"image_root": str(folder)},
        "output_dir": str(output),
        "results_dir": f"{output}_results",
        "learning_rate": 1e-2,
        "lora": {"r": 8, "alpha": 16, "dropout": 0.1},
        "max_tokens": 1000,
        "train_bs": 2,
        "grad_accum": 2,
        "dataloader_num_workers": 0,
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return {key: value for key, value in values.items() if value is not None}


def write_values(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
