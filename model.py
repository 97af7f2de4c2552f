"""Load Qwen-VL, freeze, attach LoRA, name the parameter groups, and compute the loss of a pass.

The loss asks only for what training uses: vision under `no_grad` where it is frozen, once per distinct image, and
logits at supervised positions alone.
"""

import contextlib
import functools
import logging
import re
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from attention import (
    SharedRows,
    attention_mask,
    heads_together,
    install_shared_attention,
    install_vision_attention,
    without_cudnn,
)
from batches import vision_inputs
from config import Config, Lora
from errors import UserError
from family import Family
from recurrent import forked_rows, install_forks
from tasks import task_of

OLDEST_TRANSFORMERS = (5, 23)  # an older one would ignore the images' features that it is given, and say nothing


def load_tokenizer(model_name: str):
    """Raises: `UserError` where the folder or hub name has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name '{model_name}': no tokenizer ({str(error).splitlines()[0]})") from None
    # Without its vocabulary file, transformers makes a tokenizer of the control tokens alone, and says nothing.
    if tokenizer.decode(tokenizer("Polyp")["input_ids"]) != "Polyp":
        raise UserError(f"model_name '{model_name}': no tokenizer (tokenizer.json is missing or empty)")
    if tokenizer.chat_template is None:
        raise UserError(f"model_name '{model_name}': the tokenizer has no chat template; use an Instruct model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def load_base(model_name: str, dtype: torch.dtype | str, quantization: str = "none", strict: bool = False) -> nn.Module:
    """The pretrained model on the CPU, every parameter frozen. Never runs code from the hub.

    quantization: `nf4` holds the language model's linear layers in 4 bits (QLoRA, arXiv 2305.14314, with double
    quantisation and bfloat16 compute); the vision tower, the projector, lm_head and recurrent layers' gates keep
    `dtype`.
    strict: refuse weights that the model has no place for, too; published bases may hold such.

    Raises: `UserError` where weights are missing, misshapen or not loaded completely, or transformers is too old.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        raise UserError(f"transformers {transformers.__version__} is too old; run: pip install -r requirements.txt")
    transformers_logging.disable_progress_bar()
    # Its report of keys is ours below. (On that level, it would list every layer as not sharded.)
    for name in ("modeling_utils", "distributed.tensor_parallel"):
        transformers_logging.get_logger(f"transformers.{name}").setLevel("ERROR")
    without_cudnn()
    try:
        model, report = auto_class(AutoConfig.from_pretrained(model_name)).from_pretrained(
            model_name,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            use_safetensors=True,
            quantization_config=_nf4() if quantization == "nf4" else None,
        )
    except torch.OutOfMemoryError:  # of 4-bit weights, which are made on the GPU
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model_name '{model_name}' cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    for kind in ("missing", "mismatched", *(["unexpected"] if strict else [])):
        if names := sorted(map(str, report[f"{kind}_keys"])):
            raise UserError(f"model_name '{model_name}': {len(names)} {kind} weights, first {names[0]}")
    model.requires_grad_(False)
    install_forks(model)
    if hasattr(model.model, "visual"):
        patch_embed_as_matrix_product(model)
        install_vision_attention(model)
        install_shared_attention(model)  # texts without an image share no prefix
    return model


def auto_class(model_config):
    """The transformers class that loads a model of this config: with a vision tower or without."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM


def read_fitting(path: Path, places: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that must hold exactly one for each place, of its shape.

    Raises: `UserError` where it does not, or cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            refuse_misfit(path, {name: file.get_slice(name).get_shape() for name in file.keys()}, places)  # noqa: SIM118
            return {name: file.get_tensor(name) for name in places}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or use another checkpoint") from None


def refuse_misfit(path: Path, shapes: Mapping[str, list[int]], places: Mapping[str, torch.Tensor]) -> None:
    """Raises: `UserError` naming the file, how many weights are missing, unexpected or misshapen, and the first."""
    misshapen = [name for name in shapes.keys() & places.keys() if tuple(shapes[name]) != tuple(places[name].shape)]
    kinds = {"missing": places.keys() - shapes.keys(), "unexpected": shapes.keys() - places.keys()}
    for kind, names in {**kinds, "misshapen": misshapen}.items():
        if names:
            first = min(names)
            how = f" ({list(shapes[first])}, not {list(places[first].shape)})" if kind == "misshapen" else ""
            raise UserError(
                f"{path} does not fit the model: {len(names)} {kind} weights, first {first}{how}; was it trained on "
                "another base, or with another config?"
            )


def _nf4():
    """Raises: `UserError` with the command that installs what is missing."""
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization 'nf4' needs bitsandbytes; run: pip install -r requirements-extra.txt")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # Qwen3.5's gates, as small as they are decisive: what is rounded there stays in the state
        llm_int8_skip_modules=["model.visual", "lm_head", "in_proj_a", "in_proj_b"],
    )


def patch_embed_as_matrix_product(model: nn.Module) -> None:
    """Run the patch embedding as one matrix product. Its Conv3d covers each patch exactly once, and costs 10 to 20
    times as much on some torch versions (pytorch #166122). Parameter names stay."""

    def forward(self, patches):  # (patches, channels × time × height × width)
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)

    patch_embed = model.model.visual.patch_embed
    patch_embed.forward = types.MethodType(forward, patch_embed)


# ------------------------------------------------------------------------------------------- what is trained

LANGUAGE, VISION, PROJECTOR, HEAD = "language model", "vision tower", "projector", "head"
# Under these paths, in the names of the model that `load_base` returns.
_GROUP_PATHS = OrderedDict(
    [
        (PROJECTOR, r"model\.visual\.(merger|deepstack_merger_list)\."),
        (VISION, r"model\.visual\."),
        (HEAD, r"cls_head\b"),
        (LANGUAGE, r"(model|lm_head)\b"),  # text models: model.layers; vision models: model.language_model.layers
    ]
)


def group_of(parameter_name: str) -> str:
    """The part of the model that a parameter or module belongs to."""
    name = parameter_name.removeprefix("base_model.model.")
    return next(group for group, path in _GROUP_PATHS.items() if re.match(path, name))


def trained_groups(config: Config) -> list[str]:
    """Besides the head, which always is. At a backbone rate of 0 nothing else is, and no gradient reaches it."""
    if config.backbone_learning_rate == 0:
        return []
    return [
        LANGUAGE,
        *([] if config.vision_frozen else [VISION]),
        *([] if config.projector_frozen else [PROJECTOR]),
    ]


def trains(name: str, config: Config) -> bool:
    """Whether a run of this config trains this parameter of the model itself, beside the adapter of LoRA."""
    if group_of(name) == HEAD:
        return True
    unused = task_of(config).HAS_HEAD and name == "lm_head.weight"
    return config.finetuning == "full" and group_of(name) in trained_groups(config) and not unused


def lora_target_pattern(model: nn.Module, groups: list[str]) -> str:
    """A regular expression that matches exactly the linear layers of these groups by full module path (lm_head is not
    adapted). Bare names would also hit the vision tower, and `proj` a convolution.
    Raises: `UserError` where a group has no linear layer."""
    patterns = []
    for group in groups:
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head" and group_of(name) == group
        ]
        if not names:
            raise UserError(f"LoRA found no linear layer in the {group}; is this one of the supported models?")
        patterns += dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names)
    return "|".join(patterns)


@contextlib.contextmanager
def quiet_peft():
    """Without transformers' warning to peft about a property that only peft can rename."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing` is deprecated.*")
        yield


def quiet_bitsandbytes() -> None:
    """To be called before the first import of peft, which imports bitsandbytes: its line about missing 4-bit kernels
    does not matter where none are used."""
    logging.getLogger("bitsandbytes").setLevel("ERROR")


def attach_lora(model: nn.Module, lora: Lora, groups: list[str], seed: int) -> nn.Module:
    """Wrap the model with a fresh adapter, float32 whatever the base's type. Same seed -> same adapter on all ranks."""
    if not getattr(model, "is_quantized", False):
        quiet_bitsandbytes()
    from peft import LoraConfig

    pattern = lora_target_pattern(model, groups)
    torch.manual_seed(seed)
    peft_model = wrap_with_lora(
        model,
        LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern, task_type="CAUSAL_LM"
        ),
    )
    adapted = {name.rsplit(".lora_", 1)[0] for name, p in peft_model.named_parameters() if ".lora_" in name}
    assert all(group_of(name) in groups for name in adapted), "LoRA landed outside the trained groups"
    return peft_model


def wrap_with_lora(model: nn.Module, peft_config) -> nn.Module:
    """The model with a place for an adapter of this `LoraConfig`, in training and inference alike."""
    from peft import get_peft_model

    with quiet_peft():
        peft_model = get_peft_model(model, peft_config, autocast_adapter_dtype=True)
    add_lora_in_the_product(peft_model)
    return peft_model


def add_lora_in_the_product(model: nn.Module) -> None:
    """Let every LoRA layer, on 4 bits too, add its adapter in the last matrix product, in the base's type (its own
    weights stay float32). PEFT scales and adds in passes of their own over the layer's whole output and, on a
    bfloat16 base, in float32, which moves more bytes than the frozen product itself. Switched off or merged, PEFT's own
    forward runs."""
    from peft.tuners.lora import LoraLayer

    def forward(self, x, *args, **kwargs):  # (..., features in)
        if self.disable_adapters or self.merged or args or kwargs or self.lora_variant:
            return type(self).forward(self, x, *args, **kwargs)
        (adapter,) = self.active_adapters
        flat = x.flatten(0, -2)
        result = self.base_layer(flat)  # (tokens, features out); not a view, or adding in place would copy its gradient
        down, up = self.lora_A[adapter].weight.to(x.dtype), self.lora_B[adapter].weight.to(x.dtype)
        low = F.linear(self.lora_dropout[adapter](flat), down)  # (tokens, r)
        low, up = low.to(result.dtype), up.to(result.dtype)  # autocast casts nothing in place
        return result.addmm_(low, up.t(), alpha=self.scaling[adapter]).unflatten(0, x.shape[:-1])

    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module).__name__ in ("Linear", "Linear4bit"):
            module.forward = types.MethodType(forward, module)


@contextlib.contextmanager
def adapter_in_the_bases_type(model: nn.Module):
    """While it lasts, LoRA's float32 weights have the type in which they enter the products. Else every layer casts
    them anew for each token of the answers."""
    dtype = base_of(model).get_input_embeddings().weight.dtype
    kept = {parameter: parameter.data for name, parameter in model.named_parameters() if ".lora_" in name}
    try:
        for parameter in kept:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def prepare_training(model: nn.Module, config: Config) -> nn.Module:
    """Freeze and unfreeze, attach LoRA, switch on gradient checkpointing. model: with its head, where it has one."""
    if config.finetuning == "lora":
        groups = trained_groups(config)
        model = attach_lora(model, config.lora, groups or [LANGUAGE], config.seed)
        if not groups:
            model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if trains(name, config):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # a bfloat16 weight never moves at a rate of 2e-6
    if config.gradient_checkpointing:
        base_of(model).activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


# ------------------------------------------------------------------------------------------------------ compilation


def compile_layers(model: nn.Module, config: Config, device: torch.device) -> str:
    """Compile each decoder layer that attends, for any shape, where the config and the machine allow it, and say in one
    line what was done. What stands around a layer's matrix products (norms, rotary embedding, LoRA's dropout,
    residuals) then takes a quarter of the memory traffic. A layer has at most six forms: the last layer or another ×
    one row, several, or several without a mask (the last has another where a pass asks for one place or none).

    Raises: `UserError` where `compile: true` cannot be done."""
    unfit = {
        "deterministic: true": config.deterministic,
        "parallel: fsdp": config.parallel == "fsdp",
        "4-bit weights": config.quantization != "none",
        "no GPU": device.type != "cuda" and config.compile is None,
    }
    reason = next((reason for reason, holds in unfit.items() if holds), None)
    if config.compile is False or reason:
        return f"Decoder layers run uncompiled ({reason or 'compile: false'})"
    if reason := _compiler_fails(device):
        if config.compile:
            raise UserError(
                f"compile: true, and no compiler works here ({reason}); install a C++ compiler, or remove it"
            )
        return f"Decoder layers run uncompiled (no compiler works here: {reason})"
    torch._dynamo.config.suppress_errors = not config.compile  # by default, what cannot be compiled runs as it is
    layers = text_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
    count = len(all_text_layers(model))
    others = "" if len(layers) == count else ", the recurrent ones are not"
    return f"{len(layers)} of {count} decoder layers are compiled, each form at its first use{others}"


def all_text_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of the language model."""
    inner = base_of(model).model
    return getattr(inner, "language_model", inner).layers


def text_layers(model: nn.Module) -> list[nn.Module]:
    """Those that attend; the recurrent layers of Qwen3.5 loop over chunks, other numbers of them in every batch."""
    return [layer for layer in all_text_layers(model) if hasattr(layer, "self_attn")]


def _compiler_fails(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device, or None."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton, the C++ compiler or the file system
        return str(error).strip().splitlines()[0][:120]
    finally:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # of `compiled_so_far`
        torch._dynamo.utils.compilation_time_metrics.clear()
    return None


@contextlib.contextmanager
def uncompiled(model: nn.Module):
    """While it lasts, layers run as they are: prompts and answers would need forms of their own."""
    compiled = any(layer._compiled_call_impl for layer in text_layers(model))
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


def compiled_so_far() -> tuple[int, float]:
    """(forms, seconds) that compilation has taken in this process."""
    if "torch._dynamo" not in sys.modules:  # its import takes a second
        return 0, 0.0
    from torch._dynamo.utils import compilation_time_metrics, counters

    return counters["stats"]["unique_graphs"], sum(compilation_time_metrics.get("_compile.compile_inner", []))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_groups(model: nn.Module, config: Config) -> list[dict]:
    """AdamW parameter groups: no weight decay on norms and biases. A head has groups of its own, before the others, and
    `backbone_learning_rate`, where it is given, is the rate of all but the head."""
    groups: dict = {}
    for name, parameter in trainable_parameters(model).items():
        is_head, decayed = group_of(name) == HEAD, parameter.ndim > 1
        own_rate = is_head or config.backbone_learning_rate is None
        group = {
            "params": [],
            "lr": config.learning_rate if own_rate else config.backbone_learning_rate,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        groups.setdefault((not is_head, not decayed), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def parameter_table(model: nn.Module) -> list[str]:
    """Lines for the log: total and trainable parameters of each part of the model."""
    counts = {group: [0, 0] for group in (LANGUAGE, PROJECTOR, VISION, HEAD)}
    for name, parameter in model.named_parameters():
        count = counts[group_of(name)]
        numel = parameter.numel() * (2 if hasattr(parameter, "quant_state") else 1)  # two 4-bit weights in a byte
        count[0] += numel
        count[1] += numel * parameter.requires_grad
    lines = [
        f"  {group:<15}{total:>15,} parameters {trained:>13,} trainable"
        for group, (total, trained) in counts.items()
        if total
    ]
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return [*lines, f"  {'all':<15}{total:>15,} parameters {trained:>13,} trainable ({trained / total:.2%})"]


# ------------------------------------------------------------------------------------------------- forward and loss


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


ON_HOST = frozenset(["image_grid_thw", "cu_seqlens", "cu_window_seqlens"])  # lengths, which only the host reads


def to_device(batch: dict, device: torch.device) -> dict:
    def moved(name: str, value):
        if isinstance(value, dict):
            return to_device(value, device)
        return value.to(device, non_blocking=True) if torch.is_tensor(value) and name not in ON_HOST else value

    return {name: moved(name, value) for name, value in batch.items()}


def normalise_patches(patches: torch.Tensor, family: Family) -> torch.Tensor:
    """uint8 patches (N, 3 × patch²) -> what the family's image processor gives, float32 (N, 3 × time × patch²).

    Same order of operations and same roundings as the stock processor: scale in float64, then float32 statistics.
    """
    pixels = (patches.view(len(patches), 3, 1, -1).double() * family.rescale_factor).float()
    mean, std = _statistics(family.image_mean, family.image_std, patches.device)
    pixels = (pixels - mean) / std
    return pixels.expand(-1, -1, family.temporal_patch_size, -1).flatten(1)  # a still image fills every time slot


@functools.cache
def _statistics(mean: tuple, std: tuple, device: torch.device) -> torch.Tensor:
    """(2, 1, 3, 1, 1) on the device, copied there once."""
    with torch.inference_mode(False):  # the first to ask may be an evaluation
        return torch.tensor([mean, std]).view(2, 1, 3, 1, 1).to(device)


def encode_images(model: nn.Module, batch: dict, family: Family):
    """Vision features of the image tokens in the rows, every distinct image encoded once: (features (image tokens,
    hidden_size), those of Qwen3-VL's DeepStack for each of the first layers, or None). Runs under `no_grad` unless the
    vision tower or projector is trained."""
    visual = base_of(model).model.visual
    trained = any(parameter.requires_grad for parameter in visual.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        pixels = normalise_patches(batch["patches"], family)
        found = base_of(model).get_image_features(pixels, batch["image_grid_thw"], return_dict=True, **batch["vision"])

        def in_rows(images):
            return torch.cat([images[i] for i in batch["image_index"]])

        deepstack = getattr(found, "deepstack_features", None)
        return in_rows(found.pooler_output), [in_rows(layer) for layer in deepstack] if deepstack else None


def at_places(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """states (B, T, size), places (N,) counted over the whole (B × T) -> (N, size). (A bool mask would have to be
    counted, and the host would wait for the GPU.)"""
    return states.flatten(0, 1).index_select(0, places)


def _add_features_by_place(language_model: nn.Module) -> None:
    """Let Qwen3-VL's DeepStack add its features at places instead of a bool mask, where it is given those: see
    `at_places`."""

    def add(self, hidden, places, features):  # (B, T, hidden_size), (image tokens,), (image tokens, hidden_size)
        if places.dtype == torch.bool:  # transformers' own `generate`
            return type(self)._deepstack_process(self, hidden, places, features)
        return hidden.flatten(0, 1).index_add(0, places, features.to(hidden.dtype)).view_as(hidden)

    language_model._deepstack_process = types.MethodType(add, language_model)


def _last_layer(self, hidden, mlp_places=None, **inputs):
    """In place of the last decoder layer's `forward`: its MLP, four fifths of a layer's products, runs at the places
    that are asked for alone, (B, T, hidden_size) -> (1, places, hidden_size). (The other layers ignore them.) Gradient
    checkpointing would save little here: the backward pass begins with this layer, which attends in every published
    model."""
    if mlp_places is None:
        return type(self).forward(self, hidden, **inputs)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **inputs)
    hidden = at_places(hidden + attended, mlp_places)[None]
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


def states_at(model: nn.Module, batch: dict, family: Family, places: torch.Tensor, **cache) -> torch.Tensor:
    """Run the language model on a collated batch -> its states after the final norm at these places, counted over the
    whole (B × T): (N,) -> (N, hidden_size)."""
    base, layers = base_of(model).model, all_text_layers(model)
    if getattr(layers[-1].forward, "__func__", None) is not _last_layer:
        layers[-1].forward = types.MethodType(_last_layer, layers[-1])
    cache = {"use_cache": False, "mlp_places": places, **cache}
    if not family.has_vision:
        # Without an image no prefix is shared. Positions of their own would make transformers look for packed
        # sequences, and put a mask where plain causal attention does.
        return base(input_ids=batch["input_ids"], **cache).last_hidden_state[0]
    embedded = base.language_model.embed_tokens(batch["input_ids"])
    inputs = {
        "attention_mask": None,  # plain causal; padding stands at the end, where no question can see it
        "position_ids": batch["position_ids"],
    }
    if "patches" in batch:
        if "vision" not in batch:  # collated without the family
            made = vision_inputs(batch["input_ids"], batch["image_grid_thw"], family)
            batch = batch | to_device(made, embedded.device)
        image_tokens = batch["image_tokens"]
        features, deepstack = encode_images(model, batch, family)
        flat = embedded.flatten(0, 1).index_copy(0, image_tokens, features.to(embedded.dtype))
        embedded = flat.view_as(embedded)
        if deepstack:
            _add_features_by_place(base.language_model)
            inputs |= {"visual_pos_masks": image_tokens, "deepstack_visual_embeds": deepstack}
            if len(deepstack) >= len(layers):  # a tiny model: they are added after its last layer, too
                cache["mlp_places"] = None
    is_trained = any(parameter.requires_grad for parameter in layers[0].parameters())
    if torch.is_grad_enabled() and is_trained and not embedded.requires_grad:
        embedded.requires_grad_()  # as between layers: else the first one is compiled in forms of its own
    if batch["shared_prefix"] is not None:  # without the mask, questions would read each other
        mask = attention_mask(batch["segments"])
        rows = shared_rows(base, batch["segments"], mask, embedded.dtype, prefix=batch["shared_prefix"])
        inputs |= {"attention_mask": mask, "shared_rows": rows}
        if family.is_recurrent:  # no mask reaches these layers
            inputs["forked_rows"] = forked_rows(batch)
    states = base.language_model(inputs_embeds=embedded, **{**inputs, **cache}).last_hidden_state
    return at_places(states, places) if cache["mlp_places"] is None else states[0]


def shared_rows(base: nn.Module, segments: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype, **options):
    """The `SharedRows` of a model. dtype: of the embeddings; under autocast the queries have another."""
    device, text = mask.device, base.config.get_text_config()
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    groups = heads_together(device, text.num_attention_heads, text.num_key_value_heads)
    return SharedRows(segments, mask, dtype=dtype, groups=groups, **options)


def forward_logits(model: nn.Module, batch: dict, family: Family, places: torch.Tensor, **cache) -> torch.Tensor:
    """Logits (N, vocabulary) of a collated batch at these places, counted over the whole (B × T)."""
    return base_of(model).lm_head(states_at(model, batch, family, places, **cache))


class AnswerLoss(nn.Module):
    """One pass -> the summed negative log-likelihood of its answer tokens.

    The sum, not the mean: the training step divides by the tokens of the whole optimizer step, so that the loss does
    not depend on how the step is cut into passes and ranks.
    """

    def __init__(self, model: nn.Module, family: Family):
        super().__init__()
        self.model, self.family = model, family

    def forward(self, batch: dict) -> torch.Tensor:
        logits = forward_logits(self.model, batch, self.family, batch["supervised"])
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return F.cross_entropy(logits, batch["targets"].flatten().index_select(0, batch["supervised"]), reduction="sum")
