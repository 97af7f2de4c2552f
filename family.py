"""What differs between the model families: patch sizes, pixel statistics and the coordinates they speak.

Read from the model's own config and image processor, without loading weights. And what tells one base from another.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

HUB_SECONDS = 5  # to answer

# How each family writes a point (its makers' cookbooks): thousandths of the image, or pixels of the resized image.
COORDINATES = {
    "qwen2_vl": "relative",
    "qwen2_5_vl": "absolute",
    "qwen3_vl": "relative",
    "qwen3_5": "relative",
    "qwen2": None,
    "qwen3_5_text": None,
}
RECURRENT = ("qwen3_5", "qwen3_5_text")  # three of four layers carry a state instead of attending, see `recurrent.py`


@dataclass(frozen=True)
class Family:
    """Facts about one model. `patch_size` in pixels; `min_pixels` and `max_pixels` bound native resizing."""

    model_type: str
    coordinates: str | None
    patch_size: int = 0
    merge_size: int = 0
    temporal_patch_size: int = 0
    image_mean: tuple[float, ...] = ()
    image_std: tuple[float, ...] = ()
    rescale_factor: float = 1 / 255
    min_pixels: int = 0
    max_pixels: int = 0
    image_token_id: int = -1
    window: int = 0  # pixels a side that most layers of Qwen2.5-VL's tower look at
    position_rows: int = 0  # of the tower's learned, square table of positions, where it has one
    lookback: int = 0  # tokens before its own that the convolution of recurrent layers reads
    state_bytes: int = 0  # of a question in all recurrent layers together, float32

    @property
    def has_vision(self) -> bool:
        return self.patch_size > 0

    @property
    def is_recurrent(self) -> bool:
        return self.model_type in RECURRENT

    @property
    def factor(self) -> int:
        """Pixels a side of one image token: images must be multiples of it."""
        return self.patch_size * self.merge_size

    def check_image_size(self, image_size: int | None, source: str) -> None:
        """Raises: `UserError` with the nearest sizes that fit (768 is no multiple of 28: the stock processor would
        silently train on 756)."""
        if image_size is None:
            raise UserError(f"{source}: resize 'letterbox' needs key 'image_size', a multiple of {self.factor}")
        if image_size % self.factor:
            below = image_size // self.factor * self.factor
            fits = " or ".join(str(size) for size in (below, below + self.factor) if size > 0)
            raise UserError(
                f"{source}: key 'image_size' is {image_size}, no multiple of {self.factor} "
                f"(patch {self.patch_size} × merge {self.merge_size} of {self.model_type}); use {fits}"
            )


def hub_is_asked(model_name: str) -> bool:
    """Whether files of a hub name may be looked for beyond the cache.

    Without network, transformers asks six times for each file, over 24 s, before it takes the cached one or gives the
    name up. One short question here decides for the whole process."""
    import huggingface_hub

    constants = huggingface_hub.constants
    if not constants.HF_HUB_OFFLINE and not Path(model_name).exists():
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception:
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def load_family(model_name: str) -> Family:
    """Family of a hub name or a folder. Raises: `UserError` where it cannot be read or is none of ours."""
    from transformers import AutoConfig, AutoImageProcessor

    online = hub_is_asked(model_name)
    try:
        model_config = AutoConfig.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        if not online and not Path(model_name).exists():
            raise UserError(
                f"model_name '{model_name}' is no folder here and is not in the cache, and the hub is not asked (no "
                "network, or HF_HUB_OFFLINE=1); give the model's folder, point HF_HOME to the cache that holds it, or "
                f"download it on a machine with network: hf download {model_name}"
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name '{model_name}' is no model folder and no reachable hub name: {reason}") from None
    model_type = model_config.model_type
    if model_type not in COORDINATES:
        kind = f"{model_type} (a mixture of experts)" if "moe" in model_type else model_type
        raise UserError(f"model_name '{model_name}' is a {kind}; supported: {', '.join(COORDINATES)}")
    recurrent = _recurrent_layers(model_config.get_text_config()) if model_type in RECURRENT else {}
    if not hasattr(model_config, "vision_config"):
        return Family(model_type, None, **recurrent)
    try:
        processor = AutoImageProcessor.from_pretrained(model_name, backend="pil")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name '{model_name}' has no readable preprocessor_config.json: {reason}") from None
    vision = model_config.vision_config
    for name, in_model in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        if getattr(processor, name) != in_model:
            raise UserError(
                f"model_name '{model_name}': preprocessor_config.json says {name} {getattr(processor, name)}, and "
                f"config.json {in_model}; take both files from the same model"
            )
    return Family(
        model_type=model_type,
        coordinates=COORDINATES[model_type],
        patch_size=processor.patch_size,
        merge_size=processor.merge_size,
        temporal_patch_size=processor.temporal_patch_size,
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
        rescale_factor=processor.rescale_factor,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
        image_token_id=model_config.image_token_id,
        window=getattr(vision, "window_size", 0),
        position_rows=math.isqrt(getattr(vision, "num_position_embeddings", 0)),
        **recurrent,
    )


def _recurrent_layers(text) -> dict[str, int]:
    """text: a Qwen3.5's text config."""
    state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return {
        "lookback": text.linear_conv_kernel_dim - 1,
        "state_bytes": 4 * state * text.layer_types.count("linear_attention"),
    }


# ----------------------------------------------------------------------------------------------------- which base it is

SAMPLED_TENSORS = 64


def fingerprint(model_name: str) -> dict[str, str]:
    """SHA-256 of a base's config, its tokenizer and a sample of its weights: the names, types and shapes of all tensors
    and one row of 64 of them, some hundred kB of 16 GB. A folder and a hub name of the same files give the same.

    Raises: `UserError` where it cannot be read."""
    from safetensors import SafetensorError

    try:
        tokenizer = _files_of(model_name, "tokenizer.json") or _files_of(model_name, "vocab.json", "merges.txt")
        index = _files_of(model_name, "model.safetensors.index.json")
        weight_map = json.loads(index[0].read_bytes())["weight_map"] if index else {"": "model.safetensors"}
        hashes = {
            "config": _sha256(path.read_bytes() for path in _files_of(model_name, "config.json")),
            "tokenizer": _sha256(path.read_bytes() for path in tokenizer),
            "weights": _sha256(_weights_sample(_files_of(model_name, *sorted(set(weight_map.values()))))),
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name '{model_name}' cannot be read: {reason}") from None
    return {"model_name": model_name, **hashes}


def _files_of(model_name: str, *names: str) -> list[Path]:
    """Those of a model's files that it has, of a folder or of the hub."""
    from transformers.utils import cached_file

    found = (cached_file(model_name, name, _raise_exceptions_for_missing_entries=False) for name in names)
    return [Path(path) for path in found if path]


def _sha256(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _weights_sample(files: list[Path]):
    """Bytes to hash, of safetensors files: a line for each tensor, then the middle row of some."""
    import torch
    from safetensors import safe_open

    open_files = [safe_open(path, "pt") for path in files]
    tensors = {name: file.get_slice(name) for file in open_files for name in file.keys()}  # noqa: SIM118
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.get_dtype()} {tensor.get_shape()}\n".encode()
    # Chosen by their hash: every twelfth of the names in order could be the same matrix in every layer.
    for name in sorted(tensors, key=lambda name: _sha256([name.encode()]))[:SAMPLED_TENSORS]:
        if shape := tensors[name].get_shape():
            row = tensors[name][shape[0] // 2 : shape[0] // 2 + 1] if len(shape) > 1 else tensors[name][:]
            yield row.contiguous().view(torch.uint8).numpy().tobytes()
