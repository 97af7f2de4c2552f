"""What a run will need, before it needs it: memory, work and time, as far as they can be counted without weights; the
budget of a pass in tokens, tried out at its largest."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from attention import install_shared_attention, install_vision_attention
from batches import BatchPlan, Item, Row, collate, lay_out, passes, share_out
from checkpoint import TrainerState
from classification import attach_head, make_loss
from config import Config
from dataset import SampleEncoder, StepDataset
from distributed import Ranks
from errors import UserError
from family import Family
from images import ModelImage
from inference import evaluation_rows
from model import (
    HEAD,
    LANGUAGE,
    PROJECTOR,
    VISION,
    auto_class,
    base_of,
    group_of,
    patch_embed_as_matrix_product,
    prepare_training,
    to_device,
)
from recurrent import CHUNK, install_forks
from samples import SampleList
from tasks import counted, task_of

# ------------------------------------------------------------------------------------------------------------- memory

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, and the twice quantised scale of 64


def meta_loss(config: Config, family: Family, dtype: torch.dtype) -> nn.Module:
    """The run's loss module as it computes, without weights: every shape is there and no number."""
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(config.model_name)
    with torch.device("meta"):
        base = auto_class(model_config).from_config(model_config, dtype=dtype, attn_implementation="sdpa")
        base.requires_grad_(False)
        if task_of(config).HAS_HEAD:
            attach_head(base, config.num_labels, config.seed)
        install_forks(base)
        if family.has_vision:
            patch_embed_as_matrix_product(base)
            install_vision_attention(base)
            install_shared_attention(base)
        model = prepare_training(base, config)
    if config.finetuning == "full":
        model.to(dtype)  # float32 masters compute in bfloat16: cast by FSDP, or by autocast
    if config.gradient_checkpointing:  # what is computed again in the backward pass, is on the meta device, too
        again = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), _OnMeta())}
        base_of(model).activation_checkpointing_enable(activation_checkpointing_kwargs=again)
    return make_loss(model, family, config).train()


def held_bytes(loss: nn.Module, config: Config, world_size: int, dtype: torch.dtype) -> dict[str, float]:
    """What a rank holds between two passes, in bytes: the frozen weights; what is trained, float32, with its gradients
    and AdamW's two moments; copies to compute with. loss: of `meta_loss`."""
    shards, size = world_size if config.parallel == "fsdp" else 1, dtype.itemsize
    frozen, trained, layers = 0.0, 0, Counter()
    for name, parameter in loss.model.named_parameters():
        quantized = config.quantization == "nf4" and name.endswith("base_layer.weight") and group_of(name) == LANGUAGE
        trained += parameter.numel() * parameter.requires_grad
        frozen += parameter.numel() * (not parameter.requires_grad) * (NF4_BYTES if quantized else size)
        if group_of(name) == LANGUAGE:
            layers[name.partition(".layers.")[2].split(".")[0]] += parameter.numel()
    copies = 0
    if config.parallel == "fsdp":  # the embedding and lm_head with their gradients; two layers, and a layer's gradient
        outside = layers.pop("", 0)
        copies = size * 2 * outside + (2 * size + size + 4) * max(layers.values(), default=0)
    elif config.finetuning == "full" and size < 4:
        copies = size * trained  # autocast keeps what it has cast
    return {"frozen": frozen / shards, "trained": 16 * trained / shards, "copies": copies}


class _Attention(torch.autograd.Function):
    """Stands for SDPA's kernels: what they keep for the backward pass, and what they give back."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        log_sum = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, log_sum, mask)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _dropout(states: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """As on CUDA, where one byte an element is kept."""
    return torch.native_dropout(states, p, True)[0] if p and training else states


class _OnMeta(TorchFunctionMode):
    """Lets a model on the meta device run on a batch of the CPU. What decides shapes by its values (image grids, bool
    masks) stays on the CPU; everything else follows the weights."""

    BY_VALUE = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.expand_as)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], kwargs.get("attn_mask"))
        if function is F.dropout:
            return _dropout(*args, **kwargs)
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # asked by a text model alone: whether each row is one sequence
        if function is torch.Tensor.to and args[0].dtype is torch.bool:
            return args[0]
        if function not in self.BY_VALUE:
            leaves, shape = tree_flatten((args, kwargs))
            if any(torch.is_tensor(leaf) and leaf.is_meta for leaf in leaves):
                leaves = [leaf.to("meta") if torch.is_tensor(leaf) else leaf for leaf in leaves]
                args, kwargs = tree_unflatten(leaves, shape)
        return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; `peak`: the most bytes alive at a time."""

    def __init__(self, known: Sequence[torch.Tensor]):
        """known: tensors that are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self._device = known[0].device
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.device == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


def pass_bytes(loss: nn.Module, batch: dict) -> int:
    """The most that one forward and backward holds at a time, besides weights and their gradients. loss: of
    `meta_loss`, or a real one on the device of the batch."""
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    for parameter in trained:  # they are there from the first pass of a step on
        parameter.grad = torch.zeros_like(parameter)
    held = [*loss.parameters(), *loss.buffers(), *(parameter.grad for parameter in trained)]
    with LiveBytes(held) as live, _OnMeta() if held[0].is_meta else contextlib.nullcontext():
        torch.autograd.backward(loss(batch))
    loss.zero_grad(set_to_none=True)
    return live.peak


# --------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a model; a multiplication and an addition count as two. Elementwise work is left
    out. Frozen weights cost a forward pass, and one backward where a gradient passes through; trained ones, two."""

    per_token: float  # matrices of the language model
    per_pair: float  # attention of the language model: one (query, key) pair in all layers that have it
    per_position: float  # logits, and the last layer's MLP: see `model._last_layer`
    per_patch: float  # matrices of the vision tower
    per_patch_pair: float
    per_image_token: float  # the projector
    window: int  # patches that most layers of Qwen2.5-VL's tower look at; 0: all of the image
    whole_image: float  # share of the tower's layers that look at all of it
    merge: int  # patches of an image token

    @classmethod
    def of(cls, model: nn.Module, training: bool = True, recomputed: bool = False) -> "Operations":
        """model: with what is trained marked as such. recomputed: gradient checkpointing runs every forward twice."""
        base = base_of(model)
        trained = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        through = {  # where a gradient passes
            LANGUAGE: training and bool(trained - {HEAD}),
            PROJECTOR: training and VISION in trained,
            VISION: training and VISION in trained,
            HEAD: training,
        }
        text = base.config.get_text_config()
        sums = Counter()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv3d) or (
                name.endswith("lm_head") and hasattr(base, "cls_head")
            ):
                continue
            group = group_of(name)
            in_last = group == LANGUAGE and f".layers.{text.num_hidden_layers - 1}." in name
            at_positions = name.endswith(("lm_head", "cls_head")) or (in_last and ".mlp." in name)
            again = recomputed and through[group] and group in (LANGUAGE, VISION) and not in_last and not at_positions
            times = 1 + again + through[group] + (training and module.weight.requires_grad)
            sums["positions" if at_positions else group] += 2 * times * module.weight.numel()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kinds = Counter(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
        attending, pair = text.num_hidden_layers - kinds["linear_attention"], 4 * text.num_attention_heads * size
        run_again = recomputed * (attending - 1)  # not in the last layer, as above
        recurrent = kinds["linear_attention"] and kinds["linear_attention"] * _recurrent_operations(text)
        vision = getattr(base.config, "vision_config", None)
        width = getattr(vision, "embed_dim", None) or getattr(vision, "hidden_size", 0)
        depth = getattr(vision, "depth", 0)
        full_layers = len(getattr(vision, "fullatt_block_indexes", None) or range(depth))
        window = getattr(vision, "window_size", 0) // getattr(vision, "patch_size", 1)
        return cls(
            per_token=sums[LANGUAGE] + recurrent * (1 + (2 + recomputed) * through[LANGUAGE]),
            per_pair=pair * (attending + (2 * attending + run_again) * through[LANGUAGE]),
            per_position=sums["positions"],
            per_patch=sums[VISION],
            per_patch_pair=4 * width * depth * (1 + (2 + recomputed) * through[VISION]),
            per_image_token=sums[PROJECTOR],
            window=window**2,
            whole_image=full_layers / depth if depth else 0,
            merge=getattr(vision, "spatial_merge_size", 0) ** 2,
        )

    def vision(self, image_tokens: int) -> float:
        """Of one image."""
        patches = image_tokens * self.merge
        seen = self.whole_image * patches + (1 - self.whole_image) * min(self.window, patches)
        return patches * (self.per_patch + seen * self.per_patch_pair) + image_tokens * self.per_image_token

    def useful(self, rows: Sequence[Sequence[int]], positions: int, image_tokens: Sequence[int]) -> float:
        """Of rows laid out as [tokens of the prefix, of a question, of a question, ...]: pairs that a token may see,
        logits and the last MLP at these positions, vision once for each image in `image_tokens`."""
        pairs = sum(p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in own) for p, *own in rows)
        return (
            sum(map(sum, rows)) * self.per_token
            + pairs * self.per_pair
            + positions * self.per_position
            + sum(map(self.vision, image_tokens))
        )


def _recurrent_operations(text) -> int:
    """Of one Gated DeltaNet's rule and convolution for a token: products with its state (key size × value size) and,
    within a chunk, with the other tokens."""
    key, value, heads = text.linear_key_head_dim, text.linear_value_head_dim, text.linear_num_value_heads
    channels = 2 * text.linear_num_key_heads * key + heads * value
    return heads * (6 * key * value + CHUNK * (4 * key + 2 * value)) + 2 * text.linear_conv_kernel_dim * channels


# -------------------------------------------------------------------------------------------------------- laid out


def count_step(
    items: Sequence[Item],
    share_prefix: bool,
    pass_tokens: int,
    world_size: int,
    operations: Operations | None = None,
    image_token_id: int = -1,
) -> Counter:
    """What the questions of a step come to when they are laid out: questions, rows, passes, tokens_alone (each question
    in a row of its own), tokens, padded (tokens with padding), slowest (tokens of the busiest rank), operations."""
    counts, loads = Counter(questions=len(items)), []
    counts["tokens_alone"] = sum(len(item.input_ids) for item in items)
    for share in share_out(items, share_prefix, world_size):
        own = [items[index] for index in share]
        rows = lay_out(own, share_prefix, pass_tokens)
        parts = passes(rows, pass_tokens)
        loads.append(sum(row.tokens for row in rows))
        counts["rows"] += len(rows)
        counts["passes"] += len(parts)
        counts["padded"] += sum(len(part) * part[0].tokens for part in parts)
        for part in parts if operations else ():
            counts["operations"] += _operations_of(own, part, operations, image_token_id)
    counts["tokens"] = sum(loads)
    counts["slowest"] = max(loads)
    return counts


def _operations_of(items: Sequence[Item], part: Sequence[Row], operations: Operations, image_token_id: int) -> float:
    lengths, positions, images = [], 0, []
    for row in part:
        members = [items[index] for index in row.items]
        lengths.append([row.prefix, *(len(item.input_ids) - row.prefix for item in members)])
        positions += sum(item.answer_tokens for item in members)
        count, tokens = len(members[0].images), int((members[0].input_ids == image_token_id).sum())
        images += [tokens // count] * count if count else []
    return operations.useful(lengths, positions, images)


# ------------------------------------------------------------------------------------------------- the budget of a pass

# Tokens of a pass, with padding, where the config names none. By count, an H100 needs as long for 1,000 tokens of an 8B
# as the host needs to launch a pass's 10,000 kernels; with four times as many, launch overhead overlaps with compute,
# and twice that would gain 3 % at most. A CPU needs no more than 1,000, but that cuts images' questions apart.
FULL_PASS = 4096
TRIED_ON = ("cuda",)  # a CPU has no memory that a pass could exhaust before the machine itself
USABLE = 0.92  # of the memory; the rest goes to the kernels' workspaces and to the gaps the allocator leaves
CARDS = (48, 80)  # GB
STEPS_LOOKED_AT = 20  # of the first epoch, to count a run's work
FORWARD = {"lora": 1 / 2, "full": 1 / 3}  # share of a training token's work; frozen weights need one backward, not two


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pass_budget(
    config: Config, state: TrainerState, samples: SampleList, longest: int, encoder: SampleEncoder, ranks: Ranks
) -> tuple[int, list[str]]:
    """(tokens of a pass, lines for the log). A resumed run keeps its checkpoint's budget, so that it cuts alike and
    ends bit for bit the same, unless the config names another one or the device is another. All ranks: contains an
    all_gather; the least of their budgets counts."""
    names = sorted(set(ranks.gather([device_name(ranks.device)])))  # nodes may differ, and all must decide alike
    name = " and ".join(names)
    as_before = config.pass_tokens in (None, state.pass_tokens, state.config.get("pass_tokens"))  # it may be halved
    if state.pass_tokens and state.device == name and as_before:
        return state.pass_tokens, []
    tokens = config.pass_tokens or min(ranks.gather([_that_fit(samples, longest, encoder, ranks)]))
    if not state.pass_tokens or tokens == state.pass_tokens:
        return tokens, []
    return tokens, [
        f"Passes of up to {tokens:,} tokens on {name}, where the checkpoint's were of {state.pass_tokens:,} on "
        f"{state.device}: the same questions a step, another dropout and order of sums"
    ]


def _that_fit(samples: SampleList, longest: int, encoder: SampleEncoder, ranks: Ranks) -> int:
    """Tokens of a pass on this rank's device, on which the weights are already."""
    if ranks.device.type != "cuda":
        return FULL_PASS
    config, dtype = encoder.config, torch.bfloat16
    loss = meta_loss(config, encoder.family, dtype)
    held = held_bytes(loss, config, ranks.world_size, dtype)
    free, _ = torch.cuda.mem_get_info(ranks.device)
    to_come = 0.75 * held["trained"] + held["copies"]  # the weights, a quarter of it, are there
    memory = PassMemory(loss, samples[longest], encoder, most_questions(samples, encoder.family))
    return memory.fitting(USABLE * free - to_come)


class PassMemory:
    """Bytes of a pass of so many tokens, counted for a GPU on rows of one sample: the first row, then every token."""

    def __init__(self, loss: torch.nn.Module, sample: dict, encoder: SampleEncoder, questions: int = 1):
        """loss: of `meta_loss`. questions: of an image, at the most."""
        self.full = max(FULL_PASS, encoder.config.pass_tokens or 0)
        *larger, one = largest_passes(sample, encoder, self.full, questions)
        self.row = one["input_ids"].numel()
        self.first = least = pass_bytes(loss, one)
        self.per_token = self.first / self.row
        if larger:
            many = larger[-1]
            if encoder.family.is_recurrent and many["shared_prefix"] is None:  # nothing is forked there, nor here
                least = pass_bytes(loss, one | {"shared_prefix": None})
            self.per_token = (pass_bytes(loss, many) - least) / (many["input_ids"].numel() - self.row)

    def bytes(self, tokens: int) -> float:
        return self.first + max(0, tokens - self.row) * self.per_token

    def fitting(self, room: float) -> int:
        """Tokens of the largest pass in `room` bytes, up to a full one; at least one row, whether it fits or not."""
        tokens = self.row + int((room - self.first) / self.per_token)
        return max(self.row, min(self.full, tokens // 64 * 64))


def try_largest_passes(
    loss: torch.nn.Module,
    samples: SampleList,
    longest: int,
    encoder: SampleEncoder,
    pass_tokens: int,
    moments: int,
    ranks: Ranks,
    autocast: Callable,
) -> tuple[int, list[str]]:
    """(tokens of a pass that fit, lines for the log): a run that has not enough memory finds it now, not at the largest
    sample hours later. Forward and backward, without an update; nothing of the run's state changes.
    longest: the row of the sample with the most tokens. moments: bytes of AdamW's that are not allocated yet.

    All ranks: contains all_reduces. Raises: `UserError` where the longest sample alone does not fit."""
    told: list[str] = []
    if ranks.device.type not in TRIED_ON:
        return pass_tokens, told
    loss.train()  # gradient checkpointing works in training alone
    with out_of_memory_is_said("the state of the optimizer", encoder.config):  # AdamW makes it at its first step
        to_come = torch.empty(moments, dtype=torch.uint8, device=ranks.device)
    questions = most_questions(samples, encoder.family)
    while True:
        for batch in largest_passes(samples[longest], encoder, pass_tokens, questions):
            fits = not ranks.any(not _fits(loss, batch, encoder.config, ranks, autocast))
            if not fits:
                break
        if fits:
            del to_come
            if ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(ranks.device)  # the log's `mem` is that of real passes
            return pass_tokens, told
        if len(batch["sample_ids"]) == 1:
            raise UserError(does_not_fit(samples.name(longest), encoder.config, batch))
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
            raise UserError(does_not_fit("the largest pass", config, batch)) from None
        return False
    finally:
        value = None
        loss.zero_grad(set_to_none=True)
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def out_of_memory_is_said(what: str, config: Config, batch: dict | None = None):
    """Raises: `UserError` as `does_not_fit` where the device's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(does_not_fit(what, config, batch)) from None


def does_not_fit(what: str, config: Config, batch: dict | None = None) -> str:
    """One line: what ran out of memory, how large it is, and up to three remedies, first those that a resume may take.
    batch: where a pass of it ran out."""
    rows, length = (0, 0) if batch is None else batch["input_ids"].shape
    images = batch["image_grid_thw"].tolist() if batch and "image_grid_thw" in batch else []
    grids = [f"{h}×{w} patches" for _, h, w in images]
    smaller = "image_size" if config.resize == "letterbox" else "max_pixels"
    remedies = [
        *([f"pass_tokens={rows * length // 2}"] if rows > 1 else []),
        *([] if config.gradient_checkpointing else ["gradient_checkpointing=true"]),
        *([f"a smaller {smaller}"] if grids else []),
        *(["a smaller max_tokens"] if batch is not None and task_of(config).HAS_HEAD else []),
        *([] if config.finetuning == "full" or config.quantization == "nf4" else ["quantization=nf4"]),
        *(["parallel=fsdp on more GPUs"] if config.finetuning == "full" and config.parallel == "ddp" else []),
        "a GPU with more memory",
    ]
    size = f": {rows} rows of {length} tokens, images {', '.join(grids[:4]) or 'none'}" if rows else ""
    return f"out of memory on {what}{size}. Set {'; or '.join(remedies[:3])}"


def largest_passes(sample: dict, encoder: SampleEncoder, pass_tokens: int, questions: int = 1) -> list[dict]:
    """Passes that hardly any step exceeds (a row with very many answers may): the longest sample repeated, each time
    with images of its own, as often as the budget allows; for recurrent layers, which keep a state for every question,
    so with several behind each prefix; and alone. questions: of an image, at the most."""
    images = [encoder.load_image(path) for path in encoder.images_of(sample)]
    item = encoder.encode(sample, images)
    prefix, each = item.last_image_token + 1, 1
    own = len(item.input_ids) - prefix
    if encoder.family.is_recurrent and encoder.config.share_prefix and prefix:
        each = max(1, min(questions, (pass_tokens - prefix) // own))
    forked = max(1, pass_tokens // (prefix + each * own)), each
    several = dict.fromkeys(((max(1, pass_tokens // len(item.input_ids)), 1), forked))
    several.pop((1, 1), None)  # it comes last
    return [_repeated(item, images, *shape, encoder) for shape in (*several, (1, 1))]


def most_questions(samples: SampleList, family: Family) -> int:
    """Of an image; 1 where none of them keeps a state, and nothing is searched."""
    if not family.is_recurrent:
        return 1
    return int(np.unique(samples.image_keys, return_counts=True)[1].max())


def _repeated(item: Item, images: list[ModelImage], count: int, each: int, encoder: SampleEncoder) -> dict:
    items, shown, rows = [], {}, []
    prefix = item.last_image_token + 1
    for copy in range(count):
        names = tuple(f"{copy}/{path}" for path in item.images)
        members = tuple(range(len(items), len(items) + each))
        rows.append(Row(members, prefix, prefix + each * (len(item.input_ids) - prefix)))
        items += [replace(item, images=names)] * each
        shown |= dict(zip(names, images, strict=True))
    rows = lay_out(items, share_prefix=False) if each == 1 else rows
    return collate(items, shown, True, encoder.tokenizer.pad_token_id, rows, encoder.family)


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
    """Sums of `count_step` over some of the first epoch's steps, and their number as `steps`."""
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
        # The loss once; answers once, too, and in a conversation once a turn, each after the prefix again.
        turns = sum(len(val[row].get("turns", [0])) for row in looked_at) / len(looked_at)
        scored = ((times - 1) * len(subset) + len(val)) * (1 + turns * bool(config.eval_max_samples))
        told = f"all {len(val):,} of val's {counted(config)} at the end"
        told = f"{times - 1} times {len(subset):,} and {told}" if times > 1 else told
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
    counts = count_run(config, plan, splits["train"], encoder, FULL_PASS, 1)
    return [evaluation_share(config, plan, splits, encoder, counts)[1]]


def forecast(
    config: Config,
    splits: Mapping[str, SampleList],
    longest: int,
    encoder: SampleEncoder,
    plan: BatchPlan,
    world_size: int,
    tflops: float,
) -> list[str]:
    """Lines for `--check`: what the run will need of GPUs. tflops: 10¹² operations per second that each will reach."""
    samples, dtype = splits["train"], torch.bfloat16
    loss = meta_loss(config, encoder.family, dtype)
    held = held_bytes(loss, config, world_size, dtype)
    memory = PassMemory(loss, samples[longest], encoder, most_questions(samples, encoder.family))
    wanted = config.pass_tokens or memory.full
    operations = Operations.of(loss.model, recomputed=config.gradient_checkpointing)
    counts = count_run(config, plan, samples, encoder, wanted, world_size, operations)
    share, told = evaluation_share(config, plan, splits, encoder, counts) if config.eval_steps else (0.0, "")
    adapter = "adapter" if config.finetuning == "lora" else "trained weights"
    base = "4 bits and bfloat16" if config.quantization == "nf4" else "bfloat16"
    lines = {
        f"frozen weights ({base})": held["frozen"],
        f"{adapter}, gradients, AdamW (float32)": held["trained"],
        "copies to compute with": held["copies"],
        f"pass of {wanted:,} tokens, images and logits included": memory.bytes(wanted),
    }
    # FSDP puts the whole model on every GPU while it is evaluated, when no pass is held.
    whole = dtype.itemsize * sum(p.numel() for p in loss.model.parameters()) if config.parallel == "fsdp" else 0
    evaluated = whole if config.eval_steps else 0
    lines["the whole model, instead of a pass, while it is evaluated"] = evaluated
    table = [f"  {name:<56}{value / 1e9:7.1f} GB" for name, value in lines.items() if value]
    for card in CARDS:
        room = USABLE * card * 1e9 - sum(held.values())
        tokens = config.pass_tokens or memory.fitting(room)
        beside = max(memory.bytes(tokens), evaluated)
        need = (sum(held.values()) + beside) / 1e9
        fits = f"fits, in passes of {tokens:,} tokens" if beside <= room else "does not fit"
        table.append(f"  {f'a card of {card} GB: {fits}':<56}{need:7.1f} GB")
    step = counts["operations"] / counts["steps"]
    balance = counts["tokens"] / (world_size * counts["slowest"])
    seconds = plan.total_questions * counts["operations"] / counts["questions"] / (world_size * tflops * 1e12) / balance
    minutes = seconds / (1 - share) / 60
    prefixes = counts["questions"] / counts["rows"]
    gpus = f"each of {world_size} GPUs" if world_size > 1 else "one GPU"
    return [
        f"Forecast for {gpus}, counted from shapes; nothing was measured:",
        *table,
        f"  a step: {step / 1e12:,.1f} TFLOP, {counts['tokens'] / counts['steps']:,.0f} tokens laid out, "
        f"{prefixes:.2f} {counted(config)} per prefix",
        f"  the run: {minutes:,.0f} min if each GPU reaches {tflops:g} TFLOP/s (a stated rate: --tflops)",
        *([told] if told else []),
    ]
