"""What a run will need, before it needs it: memory, work and time, as far as they can be counted without weights; the
budget of a pass in tokens, tried out at its largest."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from batches import BatchPlan, Item, collate, lay_out
from checkpoint import TrainerState
from config import Config
from counting import Operations, count_step, held_bytes, meta_loss, pass_bytes
from dataset import SampleEncoder, SampleList, StepDataset
from distributed import Ranks
from errors import UserError
from images import ModelImage
from inference import evaluation_rows
from model import to_device

# Tokens of a pass, with padding, where the config names none. By count, an H100 needs as long for 1,000 tokens of an 8B
# as the host needs to launch a pass's 10,000 kernels; with four times as many, launch overhead overlaps with compute,
# and twice that would gain 3 % at most. A CPU gains nothing from more.
FULL_PASS = {"cuda": 4096, "cpu": 1024}
TRIED_ON = ("cuda",)  # a CPU has no memory that a pass could exhaust before the machine itself
USABLE = 0.92  # of the memory; the rest goes to the kernels' workspaces and to the gaps the allocator leaves
CARDS = (48, 80)  # GB
STEPS_LOOKED_AT = 20  # of the first epoch, to count a run's work
FORWARD = {"lora": 1 / 2, "full": 1 / 3}  # share of a training token's work; frozen weights need one backward, not two


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pass_budget(
    config: Config, state: TrainerState, samples: SampleList, encoder: SampleEncoder, ranks: Ranks
) -> tuple[int, list[str]]:
    """(tokens of a pass, lines for the log). A resumed run keeps its checkpoint's budget, so that it cuts alike and
    ends bit for bit the same, unless the config names another one or the device is another. All ranks: contains an
    all_gather; the least of their budgets counts."""
    name = device_name(ranks.device)
    if state.pass_tokens and state.device == name and config.pass_tokens in (None, state.pass_tokens):
        return state.pass_tokens, []
    tokens = config.pass_tokens or min(ranks.gather([_that_fit(samples, encoder, ranks)]))
    if not state.pass_tokens or tokens == state.pass_tokens:
        return tokens, []
    return tokens, [
        f"Passes of up to {tokens:,} tokens on {name}, where the checkpoint's were of {state.pass_tokens:,} on "
        f"{state.device}: the same questions a step, another dropout and order of sums"
    ]


def _that_fit(samples: SampleList, encoder: SampleEncoder, ranks: Ranks) -> int:
    """Tokens of a pass on this rank's device, on which the weights are already."""
    if ranks.device.type != "cuda":
        return FULL_PASS[ranks.device.type]
    config, dtype = encoder.config, torch.bfloat16
    loss = meta_loss(config, encoder.family, dtype)
    held = held_bytes(loss, config, ranks.world_size, dtype)
    free, _ = torch.cuda.mem_get_info(ranks.device)
    to_come = 0.75 * held["trained"] + held["copies"]  # the weights, a quarter of it, are there
    return PassMemory(loss, samples[longest_sample(samples, encoder)], encoder).fitting(USABLE * free - to_come)


class PassMemory:
    """Bytes of a pass of so many tokens that is filled with a sample, counted for a GPU."""

    def __init__(self, loss: torch.nn.Module, sample: dict, encoder: SampleEncoder):
        """loss: of `meta_loss`."""
        self.full = max(FULL_PASS["cuda"], encoder.config.pass_tokens or 0)
        *_, many, one = [None, *largest_passes(sample, encoder, self.full)]
        self.row = one["input_ids"].numel()
        self.one = pass_bytes(loss, one)
        rows = 1 if many is None else len(many["input_ids"])
        self.each_more = (pass_bytes(loss, many) - self.one) / (rows - 1) if rows > 1 else self.one

    def bytes(self, tokens: int) -> float:
        return self.one + max(0, tokens // self.row - 1) * self.each_more

    def fitting(self, room: float) -> int:
        """Tokens of the largest pass in `room` bytes, up to a full one; at least one row, whether it fits or not."""
        rows = 1 + max(0, int((room - self.one) // self.each_more))
        return self.full if rows >= self.full // self.row else rows * self.row


def try_largest_passes(
    loss: torch.nn.Module,
    samples: SampleList,
    encoder: SampleEncoder,
    pass_tokens: int,
    ranks: Ranks,
    autocast: Callable,
) -> tuple[int, list[str]]:
    """(tokens of a pass that fit, lines for the log): a run that has not enough memory finds it now, not at the largest
    sample hours later. Forward and backward, without an update; nothing of the run's state changes.

    All ranks: contains all_reduces. Raises: `UserError` where the longest sample alone does not fit."""
    told: list[str] = []
    if ranks.device.type not in TRIED_ON:
        return pass_tokens, told
    longest = longest_sample(samples, encoder)
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


def longest_sample(samples: SampleList, encoder: SampleEncoder) -> int:
    """The row with the most tokens: those of its images from the files' headers, of its text by its bytes."""

    def tokens(row: int) -> int:
        sample = samples[row]
        grids = [encoder.size_only(path).grid for path in encoder.images_of(sample)]
        image_tokens = sum(height * width for height, width in grids) // max(1, encoder.family.merge_size**2)
        return image_tokens + len(str(sample)) // 4

    return max(range(len(samples)), key=tokens)


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


# ------------------------------------------------------------------------------------------------ counted beforehand


def count_run(
    config: Config,
    plan: BatchPlan,
    samples: SampleList,
    encoder: SampleEncoder,
    pass_tokens: int,
    world_size: int,
    operations: Operations | None = None,
) -> Counter:
    """Sums of `counting.count_step` over some of the first epoch's steps, and their number as `steps`."""
    dataset = StepDataset(samples, encoder, config.share_prefix, plan, pass_tokens, 0, world_size)
    steps = min(plan.steps_per_epoch, plan.total_steps)
    counts: Counter = Counter()
    for step in {steps * part // STEPS_LOOKED_AT for part in range(STEPS_LOOKED_AT)}:
        items = [dataset.encode(row, encoder.size_only) for row in plan.questions(step)]
        counts.update(
            count_step(items, config.share_prefix, pass_tokens, world_size, operations, encoder.family.image_token_id)
        )
        counts["steps"] += 1
    return counts


def evaluation_share(
    config: Config, plan: BatchPlan, splits: Mapping[str, SampleList], encoder: SampleEncoder, counts: Counter
) -> tuple[float, str]:
    """(share of the run's work that its evaluations are, a line that says it). counts: of `count_run`. Work is counted
    in tokens laid out, of which an evaluation needs the forward pass alone; the steps of greedy answers add few."""
    val, has_head = splits["val"], encoder.task.HAS_HEAD
    times = -(-plan.total_steps // (plan.steps_per_epoch if config.eval_steps == "epoch" else config.eval_steps))
    subset = evaluation_rows(val, config)
    looked_at = evaluation_rows(val, replace(config, eval_max_samples=200))
    dataset = StepDataset(val, encoder, config.share_prefix, plan, 0, 0, 1)
    items = [dataset.encode(row, encoder.size_only) for row in looked_at]
    tokens = sum(row.tokens for row in lay_out(items, config.share_prefix)) / len(items)
    if has_head:
        scored = times * sum(len(splits[name]) for name in ("val", "test") if name in splits)
        told = f"{times} times all of {' and '.join(name for name in ('val', 'test') if name in splits)}"
    else:
        scored = ((times - 1) * len(subset) + len(val)) * (2 if config.eval_max_samples else 1)
        told = f"{times - 1} times {len(subset):,} of val's questions, and all {len(val):,} at the end"
    work = FORWARD[config.finetuning] * scored * tokens
    training = plan.total_questions * counts["tokens"] / counts["questions"]
    share = work / (work + training)
    return share, f"Evaluation: {told}: {share:.1%} of the run's work, counted in tokens laid out"


def evaluation_line(
    config: Config, plan: BatchPlan, splits: Mapping[str, SampleList], encoder: SampleEncoder
) -> list[str]:
    """For the head of the log."""
    if not config.eval_steps:
        return []
    counts = count_run(config, plan, splits["train"], encoder, FULL_PASS["cuda"], 1)
    return [evaluation_share(config, plan, splits, encoder, counts)[1]]


def forecast(
    config: Config,
    splits: Mapping[str, SampleList],
    encoder: SampleEncoder,
    plan: BatchPlan,
    world_size: int,
    tflops: float,
) -> list[str]:
    """Lines for `--check`: what the run will need of GPUs. tflops: 10¹² operations per second that each will reach."""
    samples, dtype = splits["train"], torch.bfloat16
    loss = meta_loss(config, encoder.family, dtype)
    held = held_bytes(loss, config, world_size, dtype)
    memory = PassMemory(loss, samples[longest_sample(samples, encoder)], encoder)
    wanted = config.pass_tokens or memory.full
    operations = Operations.of(loss.model, recomputed=config.gradient_checkpointing)
    counts = count_run(config, plan, samples, encoder, wanted, world_size, operations)
    share, told = evaluation_share(config, plan, splits, encoder, counts) if config.eval_steps else (0.0, "")
    rows = max(1, wanted // memory.row)
    adapter = "adapter" if config.finetuning == "lora" else "trained weights"
    base = "4 bits and bfloat16" if config.quantization == "nf4" else "bfloat16"
    lines = {
        f"frozen weights ({base})": held["frozen"],
        f"{adapter}, gradients, AdamW (float32)": held["trained"],
        "copies to compute with": held["copies"],
        f"largest pass, {rows} × {memory.row:,} tokens, images included": memory.bytes(wanted),
    }
    table = [f"  {name:<56}{value / 1e9:7.1f} GB" for name, value in lines.items() if value]
    for card in CARDS:
        room = USABLE * card * 1e9 - sum(held.values())
        tokens = config.pass_tokens or memory.fitting(room)
        need = (sum(held.values()) + memory.bytes(tokens)) / 1e9
        fits = f"fits, in passes of {tokens:,} tokens" if memory.bytes(tokens) <= room else "does not fit"
        table.append(f"  {f'a card of {card} GB: {fits}':<56}{need:7.1f} GB")
    step = counts["operations"] / counts["steps"]
    balance = counts["tokens"] / (world_size * counts["slowest"])
    seconds = plan.total_questions * counts["operations"] / counts["questions"] / (world_size * tflops * 1e12) / balance
    minutes = seconds / (1 - share) / 60
    prefixes = counts["questions"] / counts["rows"]
    return [
        f"Forecast for each of {world_size} GPUs, counted from shapes; nothing was measured:",
        *table,
        f"  a step: {step / 1e12:,.3g} TFLOP, {counts['tokens'] / counts['steps']:,.0f} tokens laid out, "
        f"{prefixes:.2f} questions per prefix",
        f"  the run: {minutes:,.0f} min if each GPU reaches {tflops:g} TFLOP/s (a stated rate: --tflops)",
        *([told] if told else []),
    ]
