"""Tiny Qwen models with random weights, in the exact folder layout of the real ones: Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
Qwen3.5 and text-only Qwen2. The demo trains one, the tests and the benchmark build theirs here.
"""

import json
import math
import shutil
from pathlib import Path

from files import folder_beside, write_json

# Qwen's own pre-tokenizer: contractions, words with one leading mark, single digits, punctuation, line ends, spaces.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of the real vocabulary, where they follow the ordinary tokens; the second list is not marked `special`.
SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
    <|video_pad|>""".split()
EXTRA_TOKENS = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|>""".split()
THINK_TOKENS = "<tool_response> </tool_response> <think> </think>".split()  # Qwen3.5's, after those
# The tokenizer is trained on this: whole words for what the demo and the tests ask, pieces for everything else.
TOKENIZER_TEXT = """
You are a helpful assistant. You are Qwen, created by Alibaba Cloud. Answer the question about this endoscopic image.
You are a surgical image analysis assistant analysing an endoscopic image. Select your answer(s) ONLY from the provided
candidate list. For multi-label questions: Select ALL applicable items, separated by semicolons (;). For single-choice
questions: Select EXACTLY one option. Output format: item1; item2; item3 (for multi-label) or item1 (for single-choice)
Question: Candidates: Candidate list: Options: Answer: What color is the abnormality? If more than one separate with ;
Where in the image is the abnormality? Where in the image is the instrument? Where in the image is the anatomical
landmark? How many polyps are in the image? How many findings are present? How many instruments are in the image?
What type of procedure is the image taken from? What type of polyp is present? What is the size of the polyp?
Is there text? Is there a green/black box artefact? Is this finding easy to detect? Have all polyps been removed?
Are there any abnormalities in the image? Check all that are present. Are there any instruments in the image?
Are there any anatomical landmarks in the image? system user assistant
colonoscopy; gastroscopy; capsule endoscopy; yes; no; none; not relevant; polyp; ulcerative colitis; oesophagitis;
red; pink; white; yellow; green; blue; purple; brown; black; orange; grey; flesh; violet; 0; 1; 2; 3; 4; 5; 6-10; 11-20
center; center-left; center-right; upper-left; upper-center; upper-right; lower-left; lower-center; lower-right
cecum; ileum; pylorus; z-line; biopsy forceps; metal clip; polyp snare; injection needle; tube; <5mm; 5-10mm; >20mm
click the login button; tap on the card; press the key; [x, y]; {"point_2d": [512, 384]}; accept; reject; paper; title
A small number of words is enough here: the and of to in is it that for on with as was at by an be this which or from
"""
DEFAULT_SYSTEM = {
    "qwen2_vl": "You are a helpful assistant.",
    "qwen2_5_vl": "You are a helpful assistant.",
    "qwen3_vl": None,
    "qwen3_5": None,
    "qwen2": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
}

TINY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "tie_word_embeddings": False,
    "vision_hidden_size": 32,
    "vision_intermediate_size": 64,
    "vision_depth": 3,
    "vision_heads": 2,
    "vision_positions": 64,  # Qwen3-VL and Qwen3.5: 8 × 8 learned positions, resampled to each image's grid
    "head_dim": 32,  # this and those below, Qwen3.5 only; a quarter of each head is rotated
    "linear_key_heads": 2,
    "linear_value_heads": 4,
    "linear_head_dim": 16,
}
PATCHES_OF_16 = ("qwen3_vl", "qwen3_5")  # the vision tower, image processor and files that came with Qwen3-VL
# Three linear layers to one with full attention, as published.
LAYER_TYPES = ("linear_attention", "linear_attention", "linear_attention", "full_attention")


def chat_template(family: str) -> str:
    """The family's chat template as a Jinja string: roles, text, images and videos; no tools, no numbered images.

    Not a copy; it renders the same text as the real one. Two habits of Qwen3-VL that the older ones lack: no default
    system prompt, and images count only in a user's turn (a later system turn is dropped altogether).
    """
    images = (
        "{% if images and (part.type == 'image' or 'image' in part or 'image_url' in part) %}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif images and (part.type == 'video' or 'video' in part) %}<|vision_start|><|video_pad|><|vision_end|>"
    )
    say = (
        "{% macro say(content, images) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        + images
        + "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    )
    if family == "qwen3_5":
        return say + _thinking_template()
    turn = "<|im_start|>{{ message.role }}\n{{ say(message.content, WHERE) }}<|im_end|>\n"
    if family == "qwen3_vl":
        turn = turn.replace("WHERE", "message.role == 'user'")
        turn = "{% if loop.first or message.role != 'system' %}" + turn + "{% endif %}"
    else:
        default = f"<|im_start|>system\n{DEFAULT_SYSTEM[family]}<|im_end|>\n"
        turn = (
            "{% if loop.first and message.role != 'system' %}" + default + "{% endif %}" + turn.replace("WHERE", "true")
        )
    ask = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return say + "{% for message in messages %}" + turn + "{% endfor %}" + ask


def _thinking_template() -> str:
    """Qwen3.5's: texts are trimmed, a system turn may only come first, some turn must be the user's, and the answer
    opens a block of thoughts, an empty one where `enable_thinking` is false. Answers before the last question lose
    their thoughts, and later ones get a block."""
    return (
        "{% set last = namespace(user=-1) %}"
        "{% for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
        "{% endfor %}{% if last.user < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
        "{% for message in messages %}{% set text = say(message.content, true) | trim %}"
        "{% if message.role == 'system' and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
        "{% set thoughts = '' %}{% if message.role == 'assistant' and '</think>' in text %}"
        "{% set thoughts = text.split('</think>')[0].split('<think>')[-1] | trim %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' and loop.index0 > last.user %}"
        "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{{ text }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
    )


def write_tokenizer(folder: str | Path, family: str, tokenizer_from: str | Path | None = None) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt; return {token: id} with the special ones.

    `tokenizer_from`: a real tokenizer's folder, taken over as it is (its chat template included) instead of training
    one. The trained one is byte-level BPE of about 900 tokens, so any text at all can be encoded.
    """
    folder = Path(folder)
    if tokenizer_from is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(tokenizer_from) / name, folder / name)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    else:
        content = train_tokenizer(EXTRA_TOKENS + (THINK_TOKENS if family == "qwen3_5" else []))
        write_json(folder / "tokenizer.json", content)
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {"content": token["content"], **flags, "special": token["special"]}
                for token in content["added_tokens"]
            },
            "additional_special_tokens": SPECIAL_TOKENS[1:],
            "bos_token": None,
            "chat_template": chat_template(family),
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 262144 if family in PATCHES_OF_16 else 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        write_json(folder / "tokenizer_config.json", config)
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    return {**vocab, **{token["content"]: token["id"] for token in content["added_tokens"]}}


def train_tokenizer(extra_tokens: list[str]) -> dict:
    """Train the small byte-level BPE on TOKENIZER_TEXT; return the content of its tokenizer.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    # Each word with a space before it, as inside a sentence, and without, as at the start of an answer.
    words = TOKENIZER_TEXT.split()
    tokenizer.train_from_iterator([TOKENIZER_TEXT, *words, *(" " + word for word in words)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in extra_tokens])
    return json.loads(tokenizer.to_str())


def model_config(family: str, token_ids: dict[str, int], dtype, sizes: dict) -> dict:
    """config.json in the layout of the hub's own: flat for Qwen2, Qwen2-VL and Qwen2.5-VL, nested for Qwen3-VL and
    Qwen3.5."""
    import transformers

    head_dim = sizes["hidden_size"] // sizes["heads"]
    half = head_dim // 2
    # The real shares of the rotary pairs among time, height, width: 16:24:24 of 64, and 24:20:20 for Qwen3-VL.
    side = half * 20 // 64 if family == "qwen3_vl" else half * 24 // 64
    sections = [half - 2 * side, side, side]
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": sizes["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": sizes["intermediate_size"],
        "max_position_embeddings": 32768,
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "num_key_value_heads": sizes["kv_heads"],
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        # More rows than tokens, as in the real ones (151,936 rows for 151,669 tokens).
        "vocab_size": math.ceil((max(token_ids.values()) + 1) / 64) * 64 + 64,
    }
    shared = {
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
    if family == "qwen2":
        window = {"max_window_layers": sizes["layers"], "sliding_window": 32768, "use_sliding_window": False}
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text, **window,
                "rope_theta": 1000000.0, **shared}  # fmt: skip
    tokens = {
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
    }
    width, depth = sizes["vision_hidden_size"], sizes["vision_depth"]
    vision = {"depth": depth, "num_heads": sizes["vision_heads"], "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family in PATCHES_OF_16:
        vision |= {"hidden_act": "gelu_pytorch_tanh", "hidden_size": width, "initializer_range": 0.02, "patch_size": 16}
        vision |= {"intermediate_size": sizes["vision_intermediate_size"], "model_type": family, "in_channels": 3}
        vision |= {"num_position_embeddings": sizes["vision_positions"], "out_hidden_size": sizes["hidden_size"]}
    if family == "qwen3_5":
        text |= _recurrent_text(sizes) | {"dtype": shared.pop("torch_dtype")}
        vision["deepstack_visual_indexes"] = []
        return {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", **tokens,
                "text_config": text, "vision_config": vision, **shared}  # fmt: skip
    if family == "qwen3_vl":
        text |= {"attention_bias": False, "head_dim": head_dim, "model_type": "qwen3_vl_text", "rope_theta": 5000000}
        text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": sections, "rope_type": "default"}
        vision["deepstack_visual_indexes"] = list(range(depth - 1))[: sizes["layers"]]
        return {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **tokens,
                "text_config": text, "vision_config": vision, **shared}  # fmt: skip
    text |= {"max_window_layers": sizes["layers"], "sliding_window": 32768, "use_sliding_window": False}
    text |= {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": sections}}
    tokens["vision_token_id"] = token_ids["<|vision_pad|>"]
    vision |= {"patch_size": 14, "spatial_patch_size": 14, "in_chans": 3}
    if family == "qwen2_vl":
        vision |= {"embed_dim": width, "hidden_size": sizes["hidden_size"], "hidden_act": "quick_gelu"}
        vision |= {"mlp_ratio": sizes["vision_intermediate_size"] // width}
        architecture = "Qwen2VLForConditionalGeneration"
    else:
        vision |= {"hidden_size": width, "hidden_act": "silu", "intermediate_size": sizes["vision_intermediate_size"]}
        # Windows of 2×2 merged patches, full attention in the last block only, so that the window path is exercised.
        vision |= {"window_size": 56, "fullatt_block_indexes": [depth - 1], "tokens_per_second": 2}
        vision |= {"out_hidden_size": sizes["hidden_size"]}
        architecture = "Qwen2_5_VLForConditionalGeneration"
    return {"architectures": [architecture], "model_type": family, **text, **tokens, "vision_config": vision, **shared}


def _recurrent_text(sizes: dict) -> dict:
    """What Qwen3.5's text_config has beside the others'."""
    pairs = sizes["head_dim"] // 8  # rotated: a quarter of the head, among time, height, width in turn
    return {
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": len(LAYER_TYPES),
        "head_dim": sizes["head_dim"],
        "layer_types": [LAYER_TYPES[layer % len(LAYER_TYPES)] for layer in range(sizes["layers"])],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": sizes["linear_head_dim"],
        "linear_num_key_heads": sizes["linear_key_heads"],
        "linear_num_value_heads": sizes["linear_value_heads"],
        "linear_value_head_dim": sizes["linear_head_dim"],
        "mamba_ssm_dtype": "float32",
        "model_type": "qwen3_5_text",
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }


def generation_config(family: str, token_ids: dict[str, int]) -> dict:
    """generation_config.json as published: every family samples by default, Qwen2.5-VL also punishes repetition.

    A greedy answer therefore has to say so: `do_sample=False` and `repetition_penalty=1.0`.
    """
    sampling = {
        "qwen2_vl": {"temperature": 0.01, "top_k": 1, "top_p": 0.001},
        "qwen2_5_vl": {"repetition_penalty": 1.05, "temperature": 1e-6},
        "qwen3_vl": {"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        "qwen3_5": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        "qwen2": {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    }[family]
    end = token_ids["<|endoftext|>"]
    return {"bos_token_id": end, "pad_token_id": end, "do_sample": True, "eos_token_id": [token_ids["<|im_end|>"], end],
            **sampling}  # fmt: skip


def write_processors(folder: Path, family: str, min_pixels: int, max_pixels: int) -> None:
    """preprocessor_config.json (and, from Qwen3-VL on, video_preprocessor_config.json) in the family's own words."""
    if family in PATCHES_OF_16:
        half = [0.5, 0.5, 0.5]
        shared = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": half, "image_std": half}
        shared["processor_class"] = "Qwen3VLProcessor"
        image_size = {"size": {"longest_edge": max_pixels, "shortest_edge": min_pixels}}
        image_kind = {"image_processor_type": "Qwen2VLImageProcessorFast"}
        write_json(folder / "preprocessor_config.json", image_size | shared | image_kind)
        video_size = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
        video_kind = {"video_processor_type": "Qwen3VLVideoProcessor"}
        write_json(folder / "video_preprocessor_config.json", video_size | shared | video_kind)
        return
    # The statistics that CLIP was trained with.
    content = {"min_pixels": min_pixels, "max_pixels": max_pixels, "patch_size": 14, "temporal_patch_size": 2,
               "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
               "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "Qwen2VLImageProcessor",
               "processor_class": "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"}  # fmt: skip
    write_json(folder / "preprocessor_config.json", content)


def make_teachable(model) -> None:
    """Give a random model weights of a size that LoRA can work with, in place.

    At the usual standard deviation of 0.02 a frozen random model of this size cannot be taught: its logits stay within
    ±1 whatever the adapter does, and images arrive as near-zeros. Here every layer of the language model and the
    projector keeps the size of what passes through it; the vision tower's blocks stay close to the identity.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                torch.nn.init.normal_(weight, std=1.0)
            if "lm_head" in name or ("embed_tokens" in name and model.config.tie_word_embeddings):
                torch.nn.init.normal_(weight, std=4 / math.sqrt(weight.shape[1]))
            elif "pos_embed" in name:
                torch.nn.init.normal_(weight, std=0.5)
            elif weight.ndim == 2 and "visual.blocks" not in name and "embed_tokens" not in name:
                torch.nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))


def make_remember(model) -> None:
    """Let the states of a random Qwen3.5's recurrent layers last for tens to hundreds of tokens, in place. As they are
    initialised, most heads have forgotten everything two tokens later, and no test would notice a state that leaks."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".A_log"):
                weight.uniform_(math.log(1e-3), math.log(1e-1))


def write_tiny_model(
    folder: str | Path,
    family: str,
    seed: int = 0,
    *,
    dtype="float32",
    teachable: bool = False,
    tokenizer_from: str | Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    **sizes: int,
) -> Path:
    """Write a tiny model with random weights to `folder`, which must not exist, and return its path.

    family: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, or qwen2 (text only). The folder has the files of the real one on
    the hub: config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, vocab.json,
    merges.txt, chat_template.json or .jinja, preprocessor_config.json. The same arguments give the same bytes.
    dtype: the weights' dtype on disk, as a torch dtype or its name. tokenizer_from: folder of a real tokenizer.
    teachable: weights that LoRA alone can teach a task within minutes, see `make_teachable`.
    min_pixels, max_pixels: the image processor's bounds in pixels; by default the real ones, except that images down
    to 64×64 (Qwen3-VL, Qwen3.5) or 56×56 stay as they are. sizes: any key of TINY_SIZES.
    Raises: `ValueError` on an unknown family or size, or an existing folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    if family not in DEFAULT_SYSTEM:
        raise ValueError(f"family {family!r}: choose one of {', '.join(DEFAULT_SYSTEM)}")
    if unknown := sizes.keys() - TINY_SIZES:
        raise ValueError(f"size {sorted(unknown)[0]!r}: choose from {', '.join(TINY_SIZES)}")
    layers = len(LAYER_TYPES) if family == "qwen3_5" else TINY_SIZES["layers"]
    sizes, folder = TINY_SIZES | {"layers": layers} | sizes, Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; delete it or choose another folder")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with folder_beside(folder) as partial:
        token_ids = write_tokenizer(partial, family, tokenizer_from)
        config = model_config(family, token_ids, dtype, sizes)
        write_json(partial / "config.json", config)
        auto = AutoModelForCausalLM if family == "qwen2" else AutoModelForImageTextToText
        logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(AutoConfig.from_pretrained(partial), dtype=torch.float32)
            if teachable:
                make_teachable(model)
            make_remember(model)
        model.to(dtype).save_pretrained(partial)
        write_json(partial / "config.json", config)  # save_pretrained wrote its own, in today's layout
        write_json(partial / "generation_config.json", generation_config(family, token_ids))
        template = json.loads((partial / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        if family in PATCHES_OF_16:
            (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
        elif family != "qwen2":
            write_json(partial / "chat_template.json", {"chat_template": template})
        if family != "qwen2":
            default_min, default_max = (64 * 64, 16777216) if family in PATCHES_OF_16 else (56 * 56, 12845056)
            write_processors(partial, family, min_pixels or default_min, max_pixels or default_max)
    return folder
