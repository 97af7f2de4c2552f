"""python predict.py --adapter-path outputs/exp2 --image X.png --prompt "..." [--draw OUT.png]
python predict.py --adapter-path merged/exp2 --verify http://localhost:8000/v1

One image, one prompt, one answer, on the GPU where there is one. The folder is that of a run, one of its checkpoints
or a merged model; its config says how the image and the prompt are shown, as in training. For clicks, the point is
printed in pixels of the original image, and --draw marks it there. For classification, the document's pages are the
images, or its text is the prompt.
"""

import argparse
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from PIL import Image, ImageDraw

from checkpoint import load_trained
from classification import make_loss
from config import load_config
from distributed import start_ranks
from errors import UserError, exit_on_user_error
from files import refuse_unusable_folder
from images import open_image
from inference import predict_split
from merged import reference
from preflight import check_samples, open_encoder
from run_folder import config_of, with_own_model
from samples import SampleList
from tasks import task_of

RED, WHITE = "#e0352b", "#ffffff"


def draw_point(image: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A copy of the image with a ring around the point (x, y), in its pixels, and four ticks outside that point at its
    centre. What the ring encloses, the target, and the rest of the image stay as they are, bit for bit."""
    radius = max(8.0, math.hypot(*image.size) / 20)  # around a large digit, too
    margin = math.ceil(1.4 * radius) + 1
    left, top = (math.floor(value) - margin for value in point)
    # Drawn four times too large, because Pillow's lines have no soft edges.
    mark = Image.new("RGBA", (8 * margin, 8 * margin), "#ffffff00")
    draw = ImageDraw.Draw(mark)
    x, y, radius = 4 * (point[0] - left), 4 * (point[1] - top), 4 * radius
    for colour, width in ((WHITE, radius / 7), (RED, radius / 16)):  # seen on light and on dark
        line = max(1, round(width))
        outer = radius + width / 2
        draw.ellipse((x - outer, y - outer, x + outer, y + outer), outline=colour, width=line)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            start, end = radius, 1.2 * radius + width / 2
            draw.line((x + dx * start, y + dy * start, x + dx * end, y + dy * end), fill=colour, width=line)
    mark = mark.resize((2 * margin, 2 * margin), Image.Resampling.BOX)
    marked = image.copy()
    marked.paste(mark, (left, top), mark)
    return marked


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter-path", type=Path, metavar="DIR",
                        help="a run's output folder, a checkpoint in it, or a merged model")  # fmt: skip
    parser.add_argument("--image", type=Path, nargs="+", metavar="X.png", default=[], help="one or more images")
    parser.add_argument("--prompt", default="", help="the question or instruction; for classification, the text")
    parser.add_argument("--candidates", metavar="'A; B; C'", default="",
                        help="candidate answers, for models trained with candidate lists")  # fmt: skip
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="clicks: the image with the point marked")
    parser.add_argument("--verify", metavar="URL|DIR",
                        help="ask an OpenAI-compatible server of the merged model in --adapter-path, or a copy of its "
                             "folder, for its reference answers, and say what differs")  # fmt: skip
    parser.add_argument("--config", help="the run's config, for an adapter folder that holds none")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any config key")
    args = parser.parse_intermixed_args(arguments)

    started = time.perf_counter()
    folder = args.adapter_path
    if args.verify and not folder and "://" not in args.verify:
        folder = Path(args.verify)
    if not folder:
        raise UserError("give --adapter-path: a run's output folder, or a merged model")
    if args.verify:
        if not reference.verify(args.verify, folder):
            raise SystemExit(1)
        return
    if not folder.is_dir():
        raise UserError(f"--adapter-path {folder} is no folder; give a run's output folder or a merged model")
    if args.config:
        config = with_own_model(load_config(args.config, args.overrides), folder)
    else:
        config = config_of(folder, args.overrides)
    if args.draw and not task_of(config).POINTS:
        raise UserError(f"--draw marks clicks, and this model's task is '{config.task}'; leave it out")
    if args.draw and args.draw.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--draw {args.draw}: give a file name that ends with .png")
    if args.draw:
        refuse_unusable_folder(args.draw.parent, "--draw")
    for path in args.image:
        if re.match(r"\w+:/", str(path)):
            raise UserError(f"--image {path} is an address, and only files are read; download it first")
    # Everything that can be wrong comes before the weights: a wrong path costs no minutes.
    original = open_image(args.image[0]) if args.image else None
    # The images come from anywhere on this machine, one at a time.
    run_config = config
    config = replace(config, data=replace(config.data, image_root="/"), dataloader_num_workers=0)
    encoder = open_encoder(config, str(folder), folder)
    candidates = [text.strip() for text in args.candidates.split(";") if text.strip()]
    images = [path.resolve() for path in args.image]
    sample = {"id": "prompt", "images": list(map(str, images))}
    sample |= encoder.task.sample_to_predict(images, args.prompt, candidates, run_config)
    samples = SampleList([sample], "--prompt")
    check_samples(samples, encoder)
    ranks = start_ranks()
    model = load_trained(config, folder, ranks.device)
    loaded = time.perf_counter()
    with torch.no_grad():
        (line,) = predict_split(make_loss(model, encoder.family, config), samples, encoder, ranks)
    answered = time.perf_counter()
    print("\n".join(encoder.task.describe(line)))
    point = line.get("predicted_point")
    if args.draw and point:
        args.draw.parent.mkdir(parents=True, exist_ok=True)
        draw_point(original, point).save(args.draw)
        print(f"Drawn in {args.draw}")
    print(
        f"Loaded in {loaded - started:.1f} s, answered in {answered - loaded:.2f} s on {ranks.device.type}", flush=True
    )
    if args.draw and not point:
        raise SystemExit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
