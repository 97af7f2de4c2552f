"""What a run will need, before it needs it: the budget of a pass in tokens, tried out at its largest."""

from collections.abc import Callable
from dataclasses import replace

import torch

from batches import Item, collate, lay_out
from checkpoint import TrainerState
from config import Config
from dataset import SampleEncoder
from distributed import Ranks
from errors import UserError
from images import ModelImage
from model import base_of, to_device
from samples import SampleList

# Tokens of a pass, with padding, where the config names none. By count, an H100 needs as long for 1,000 tokens of an 8B
# as the host needs to launch a pass's 10,000 kernels; with four times as many, launch overhead overlaps with compute,
# and twice that would gain 3 % at most. A CPU gains nothing from more.
FULL_PASS = {"cuda": 4096, "cpu": 1024}
TRIED_ON = ("cuda",)  # a CPU has no memory that a pass could exhaust before the machine itself
ACTIVATION_SHARE = 0.8  # of the free memory; the rest is for the vision tower, logits and what the allocator wastes


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pass_budget(config: Config, state: TrainerState, model: torch.nn.Module, ranks: Ranks) -> tuple[int, list[str]]:
    """(tokens of a pass, lines for the log). A resumed run keeps its checkpoint's budget, so that it cuts alike and
    ends bit for bit the same, unless the config names another one or the device is another. All ranks: contains an
    all_gather; the least of their budgets counts."""
    name = device_name(ranks.device)
    if state.pass_tokens and state.device == name and config.pass_tokens in (None, state.pass_tokens):
        return state.pass_tokens, []
    tokens = config.pass_tokens or min(ranks.gather([_that_fit(model, config, ranks.device)]))
    if not state.pass_tokens or tokens == state.pass_tokens:
        return tokens, []
    return tokens, [
        f"Passes of up to {tokens:,} tokens on {name}, where the checkpoint's were of {state.pass_tokens:,} on "
        f"{state.device}: the same questions a step, another dropout and order of sums"
    ]


def _that_fit(model: torch.nn.Module, config: Config, device: torch.device) -> int:
    full = FULL_PASS[device.type]
    if device.type != "cuda":
        return full
    free, _ = torch.cuda.mem_get_info(device)
    fitting = int(ACTIVATION_SHARE * free / activation_bytes_per_token(model, config))
    return max(256, min(full, fitting // 256 * 256))


def activation_bytes_per_token(model: torch.nn.Module, config: Config) -> float:
    """What the language model keeps of a token for the backward pass. Counted at the 8B's shape with LoRA: 9.4 MB with
    dropout, 7.2 MB without; of a checkpointed layer, its input alone is kept."""
    text = base_of(model).config.get_text_config()
    element = 2 if torch.cuda.is_available() else 4
    if config.gradient_checkpointing:
        return text.num_hidden_layers * text.hidden_size * element
    return text.num_hidden_layers * (14 * text.hidden_size + 6 * text.intermediate_size) * element


def try_largest_passes(
    loss: torch.nn.Module,
    samples: SampleList,
    longest: int,
    encoder: SampleEncoder,
    pass_tokens: int,
    ranks: Ranks,
    autocast: Callable,
) -> tuple[int, list[str]]:
    """(tokens of a pass that fit, lines for the log): a run that has not enough memory finds it now, not at the largest
    sample hours later. Forward and backward, without an update; nothing of the run's state changes.
    longest: the row of the sample with the most tokens.

    All ranks: contains all_reduces. Raises: `UserError` where the longest sample alone does not fit."""
    told: list[str] = []
    if ranks.device.type not in TRIED_ON:
        return pass_tokens, told
    while True:
        for batch in largest_passes(samples[longest], encoder, pass_tokens):
            fits = not ranks.any(not _fits(loss, batch, encoder.config, ranks, autocast))
            if not fits:
                break
        if fits:
            return pass_tokens, told
        if len(batch["input_ids"]) == 1:
            raise UserError(does_not_fit(samples.name(longest), batch, encoder.config))
        told.append(f"Out of memory on a pass of {pass_tokens:,} tokens: going on with pass_tokens={pass_tokens // 2}")
        pass_tokens //= 2


def _fits(loss: torch.nn.Module, batch: dict, config: Config, ranks: Ranks, autocast: Callable) -> bool:
    try:
        with autocast():
            value = loss(to_device(batch, ranks.device))
            value.backward()
        return True
    except torch.OutOfMemoryError:
        if config.parallel == "fsdp":  # the other ranks wait for this one's part of a layer
            raise UserError(does_not_fit("the largest pass", batch, config)) from None
        return False
    finally:
        value = None
        loss.zero_grad(set_to_none=True)
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def does_not_fit(what: str, batch: dict, config: Config) -> str:
    """One line: what ran out of memory, how large it is, and three remedies."""
    rows, length = batch["input_ids"].shape
    grids = [f"{h}×{w} patches" for _, h, w in batch.get("image_grid_thw", torch.empty(0, 3)).tolist()]
    smaller = "image_size" if config.resize == "letterbox" else "max_pixels"
    remedies = [
        *([] if config.gradient_checkpointing else ["gradient_checkpointing=true"]),
        f"a smaller {smaller} or max_tokens",
        *([] if config.finetuning == "full" or config.quantization == "nf4" else ["quantization=nf4"]),
        *([f"pass_tokens={rows * length // 2}"] if rows > 1 else []),
        "a GPU with more memory, or parallel=fsdp on more of them with finetuning=full",
    ]
    return (
        f"out of memory on {what}: {rows} rows of {length} tokens, images {', '.join(grids[:4]) or 'none'}. "
        f"Set {'; or '.join(remedies[:3])}"
    )


def largest_passes(sample: dict, encoder: SampleEncoder, pass_tokens: int) -> list[dict]:
    """Two passes that no step exceeds: the longest sample repeated, each time with images of its own, as often as the
    budget allows; and alone."""
    images = [encoder.load_image(path) for path in encoder.images_of(sample)]
    item = encoder.encode(sample, images)
    counts = dict.fromkeys((max(1, pass_tokens // len(item.input_ids)), 1))
    return [_repeated(item, images, count, encoder) for count in counts]


def _repeated(item: Item, images: list[ModelImage], count: int, encoder: SampleEncoder) -> dict:
    items, shown = [], {}
    for copy in range(count):
        names = tuple(f"{copy}/{path}" for path in item.images)
        items.append(replace(item, images=names))
        shown |= dict(zip(names, images, strict=True))
    return collate(items, shown, True, encoder.tokenizer.pad_token_id, lay_out(items, share_prefix=False))
