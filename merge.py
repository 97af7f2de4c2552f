"""python merge.py --adapter-path outputs/exp2 --out merged/exp2 [--push USER/REPO]

An adapter and its base -> one plain model folder that `from_pretrained` loads, with tokenizer, image processor, greedy
generation config, model card and a few reference answers (`predict.py --verify` asks a server or a copy the same). The
folder appears only after merged and adapted logits agreed on real inputs. --push
uploads exactly that folder; the token comes from HF_TOKEN or `hf auth login`. Without --adapter-path, --push uploads a
folder that was merged before.
"""

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from PIL import Image, ImageDraw

import model as modeling
from checkpoint import load_trained
from config import Config, load_config, to_yaml
from dataset import EvalDataset, SampleEncoder
from errors import UserError, exit_on_user_error
from family import Family
from files import read_json, refuse_unusable_folder, save_atomically, write_json
from merged import publish, reference
from preflight import open_encoder
from run_folder import MERGED_CONFIG_FILE, config_of, with_own_model
from samples import SampleList, load_samples
from tasks import records, task_of

SHARD_SIZE = "5GB"
CHECKED_SAMPLES = 3
# Largest root mean square difference of the logits, as a share of their spread. A merged weight is rounded to its type
# (2^-24 or 2^-8 of its size, float16 2^-11), and a matrix product goes another way than product plus adapter.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The base's own small files are taken over word for word: rewritten by this version, they could confuse other software.
BASE_FILES = """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.json chat_template.jinja preprocessor_config.json
    processor_config.json video_preprocessor_config.json""".split()
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


# ---------------------------------------------------------------------------------------------------------- merge


def merged_into_base(model: torch.nn.Module) -> torch.nn.Module:
    """The plain transformers model. Each sum is made in float32 and rounded once to the base's dtype."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


# ------------------------------------------------------------------------------------------------------- the check


def inputs_to_check(config: Config, encoder: SampleEncoder, scratch: Path) -> tuple[SampleList, SampleEncoder, str]:
    """A few samples of the run (where its data are not at hand, one drawn into the folder `scratch`), their encoder,
    and what they are."""
    for split in ("val", "test", "train"):
        path = getattr(config.data, split)
        if not path:
            continue
        try:
            samples = load_samples(path, CHECKED_SAMPLES)
            for row in range(len(samples)):
                encoder.encode(samples[row], [encoder.load_image(name) for name in encoder.images_of(samples[row])])
            return samples, encoder, f"{len(samples)} samples of the {split} split"
        except UserError as error:
            print(f"The {split} split cannot serve to check the merge: {error}")
    image = Image.new("RGB", (320, 240), "#d9b8a4")
    ImageDraw.Draw(image).ellipse((60, 50, 160, 150), fill="#b03030")
    image.save(scratch / "drawn.png")
    sample = {"id": "drawn", "image": "drawn.png", "question": "What colour is the disc?", "answer": "red"}
    sample |= {"instruction": "click the red disc", "point": [110, 100]}
    encoder = SampleEncoder(replace(config, data=replace(config.data, image_root=str(scratch))), encoder.family,
                            encoder.tokenizer)  # fmt: skip
    return SampleList([sample], "drawn"), encoder, "a drawn image"


@torch.no_grad()
def answer_logits(model: torch.nn.Module, samples: SampleList, encoder: SampleEncoder, device) -> torch.Tensor:
    """Logits (answer tokens, vocabulary) in float32 on the CPU: of each sample's gold answer, given its prompt."""
    batches = EvalDataset(samples, encoder, share_prefix=False, eval_bs=1, generation=False)
    logits = []
    for index in range(len(batches)):
        batch = batches[index]
        if "error" in batch:
            raise UserError(batch["error"])
        batch = modeling.to_device(batch, device)
        logits.append(modeling.forward_logits(model, batch, encoder.family, batch["supervised"]).float().cpu())
    return torch.cat(logits)


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of the reference's spread within a position."""
    spread = (reference - reference.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((logits - reference).square().mean().sqrt() / spread)


def base_logits(model: torch.nn.Module, samples: SampleList, encoder: SampleEncoder, device) -> torch.Tensor | None:
    """The same without the adapter; None where the model has none."""
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return answer_logits(model, samples, encoder, device)


def compare(merged, adapted, alone, what: str, dtype: torch.dtype) -> str:
    """Sentences about how far the merged model's logits are from those of base and adapter.

    Raises: `UserError` where they are farther than `TOLERANCE`, or not finite."""
    difference, tolerance = relative_difference(merged, adapted), TOLERANCE[dtype]
    check = (
        f"On {what} ({len(adapted)} answer tokens), the logits of the merged model differ from those of base and "
        f"adapter by {difference:.1e} of their spread; the tolerance for {dtype} is {tolerance:g}."
    )
    if not difference <= tolerance:
        raise UserError(
            f"{check} The merge is not written; is the adapter finite, and the base the one it was made on?"
        )
    if alone is not None:
        change = relative_difference(alone, adapted)
        check += f" Without the adapter they differ by {change:.1e}."
        if change <= tolerance:
            check += " That is so little that this comparison proves little."
    print(check, flush=True)
    return check


def load_plainly(folder: Path) -> torch.nn.Module:
    """As any user of the folder loads it. Raises: `UserError` where a key is missing, unexpected or misshapen."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = {kind: report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]}
    if wrong:
        told = "; ".join(f"{len(keys)} {kind}, first {sorted(map(str, keys))[0]}" for kind, keys in wrong.items())
        raise UserError(f"the merged model does not load cleanly ({told}); nothing was written")
    return model.eval()


# -------------------------------------------------------------------------------------------------------- the folder


def write_model(model: torch.nn.Module, config: Config, family: Family, temporary: Path) -> None:
    """Shards, the base's config, tokenizer and image processor, and a generation config that answers greedily."""
    from transformers.utils import cached_file

    model.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
    for name in BASE_FILES:
        path = cached_file(config.model_name, name, _raise_exceptions_for_missing_entries=False)
        if path:
            (temporary / name).write_bytes(Path(path).read_bytes())
    generation = temporary / "generation_config.json"
    kept = read_json(generation, "restore the base's own") if generation.is_file() else {}
    kept = {key: value for key, value in kept.items() if key not in SAMPLING}
    write_json(generation, {**kept, "do_sample": False})  # as evaluate.py answers
    for name, content in records(family, config).items():
        write_json(temporary / name, content)
    text = "# The run's config, without folders of the machine it ran on.\n" + to_yaml(publish.public_config(config))
    (temporary / MERGED_CONFIG_FILE).write_text(text, encoding="utf-8")


def refuse_full_disk(model: torch.nn.Module, out: Path) -> None:
    """Raises: `UserError` where the merged weights would not fit."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    weights = (p for name, p in model.named_parameters() if ".lora_" not in name)
    needed, free = sum(p.numel() * p.element_size() for p in weights), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"--out {out} needs {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free in {parent}")


def merge(config: Config, folder: Path, out: Path, name: str) -> None:
    """Merge, check, and let the folder appear. name: what the model card calls the model."""
    if task_of(config).HAS_HEAD:
        raise UserError("merge.py does not know task 'cls'; evaluate.py and predict.py read its folder as it is")
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = open_encoder(config, str(folder), folder)
    with tempfile.TemporaryDirectory() as scratch:
        samples, encoder, what = inputs_to_check(config, encoder, Path(scratch))
        print(f"Merging {folder} into {config.model_name}, to be checked on {what}", flush=True)
        # The base in its own dtype and in full precision, whatever it was trained in.
        model = load_trained(replace(config, quantization="none"), folder, device, "auto")
        refuse_full_disk(model, out)
        adapted = answer_logits(model, samples, encoder, device)
        alone = base_logits(model, samples, encoder, device)
        model = merged_into_base(model)

        def write(temporary: Path) -> None:
            write_model(model, config, encoder.family, temporary)
            model.to("meta")  # frees it: two copies need not fit side by side
            plain = load_plainly(temporary).to(device)
            merged = answer_logits(plain, samples, encoder, device)
            check = compare(merged, adapted, alone, what, next(model.parameters()).dtype)
            reference.write(config, encoder, plain, temporary)
            counts, scores = publish.data_counts(config), publish.scores_of(config, folder)
            card = publish.model_card(name, config, counts, scores, check)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            publish.files_of(temporary)

        size, _ = save_atomically(out, write, "run merge.py again")
    print(f"Merged model of {size / 1e9:.2f} GB in {out}, {time.perf_counter() - started:.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter-path", type=Path, metavar="DIR", help="a run's output folder, or a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist yet")
    parser.add_argument("--push", metavar="USER/REPO", help="upload the merged folder; a new repository is private")
    parser.add_argument("--config", help="the run's config, for an adapter folder that holds none")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any config key, e.g. model_name=DIR"
    )
    args = parser.parse_intermixed_args(arguments)
    if not args.adapter_path and not args.push:
        raise UserError("give --adapter-path, the folder to merge (or --push, to upload a folder merged before)")
    if args.push:
        publish.check_access(args.push)
    if args.adapter_path:
        if not args.adapter_path.is_dir():
            raise UserError(f"--adapter-path {args.adapter_path} is no folder; give a run's output folder")
        refuse_unusable_folder(args.out.parent, "--out")
        is_empty = args.out.is_dir() and not args.out.is_symlink() and not any(args.out.iterdir())
        if os.path.lexists(args.out) and not is_empty:
            raise UserError(f"--out {args.out} exists already; choose a new folder, or delete it")
        if is_empty:
            args.out.rmdir()
        if args.config:
            config = with_own_model(load_config(args.config, args.overrides), args.adapter_path)
        else:
            config = config_of(args.adapter_path, args.overrides)
        merge(config, args.adapter_path, args.out, args.push or args.out.name)
    if args.push:
        print(f"Pushed to {publish.push(args.out, args.push)}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
