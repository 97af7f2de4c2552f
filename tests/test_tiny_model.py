"""The tiny models have the folder layout, the chat templates and the habits of the real ones."""

import json

import pytest
import torch
from conftest import shared_data
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from toy import tiny_model

VISION_FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
IMAGE = {"type": "image"}
ASK = {"type": "text", "text": "Where in the image is the abnormality?\n"}


def conversations(lists=True):
    """Message lists that the families' templates must render alike; `lists` off leaves out list content."""
    user, answer = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": " 3\n"}
    system = {"role": "system", "content": "You answer briefly."}
    yield from ([user], [system, user], [user, answer], [system, user, answer, user, answer, user])
    if lists:
        yield [{"role": "user", "content": [IMAGE, ASK]}]
        yield [{"role": "user", "content": [ASK, {"type": "image", "image": "a.jpg"}, ASK, IMAGE]}, answer, user]
        yield [{"role": "system", "content": [ASK]}, {"role": "user", "content": [{"type": "video"}, IMAGE]}]
        yield [{"role": "user", "content": []}, {"role": "assistant", "content": [ASK]}, user]


def real_template(family):
    """The family's published chat template; Qwen2-VL's and Qwen2.5-VL's are the same text."""
    if family == "qwen3_vl":
        return shared_data("configs/Qwen3-VL-Instruct/chat_template.jinja").read_text(encoding="utf-8")
    if family == "qwen2":
        return shared_data("configs/Qwen2.5-Instruct/chat_template.jinja").read_text(encoding="utf-8")
    file = shared_data("configs/Qwen2.5-VL-7B-Instruct/chat_template.json")
    return json.loads(file.read_text(encoding="utf-8"))["chat_template"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2"])
def test_tiny_template_renders_what_the_real_template_renders(tiny_models, family):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[family])
    real = real_template(family)
    for messages in conversations(lists=family != "qwen2"):
        for add_generation_prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            expected = tokenizer.apply_chat_template(messages, chat_template=real, **options)
            assert tokenizer.apply_chat_template(messages, **options) == expected


@pytest.mark.parametrize("family", [*VISION_FAMILIES, "qwen2"])
def test_folder_has_exactly_the_files_of_the_real_one(tiny_models, family):
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files |= {"vocab.json", "merges.txt"}
    if family != "qwen2":
        files |= {"preprocessor_config.json", "chat_template.json"}
    if family in ("qwen3_vl", "qwen3_5"):
        files = files - {"chat_template.json"} | {"chat_template.jinja", "video_preprocessor_config.json"}
    assert {path.name for path in tiny_models[family].iterdir()} == files


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("qwen2_5_vl", "configs/Qwen2.5-VL-7B-Instruct"),
        ("qwen3_vl", "configs/Qwen3-VL-Embedding-8B"),
        ("qwen3_vl", "configs/Qwen3-VL-Instruct"),
    ],
)
def test_json_files_have_the_keys_and_kinds_of_the_published_ones(tiny_models, family, published):
    def shape(value):
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return type(value).__name__ if not isinstance(value, list) else "list"

    # The embedding model's config says dtype; the instruct models of its time said torch_dtype, like the others.
    renamed = {"dtype": None, "torch_dtype": None, "use_cache": None, "transformers_version": None}
    for name in ("config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        real_file = shared_data(published) / name
        if not real_file.exists() or (published.endswith("8B") and name != "config.json"):
            continue
        real, tiny = (json.loads(path.read_text()) for path in (real_file, tiny_models[family] / name))
        for part in (real, real.get("text_config", {}), real.get("vision_config", {})):
            for key in renamed:
                part.pop(key, None)
        for part in (tiny, tiny.get("text_config", {}), tiny.get("vision_config", {})):
            for key in renamed:
                part.pop(key, None)
        assert shape(tiny) == shape(real)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_plain_auto_classes_load_every_weight_and_generate(tiny_models, family):
    folder = tiny_models[family]
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    side = 2 * processor.patch_size * 3  # three merged patches
    pixels = processor(images=[Image.effect_noise((side, 2 * side), 60).convert("RGB")], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 12, 6]]
    messages = [{"role": "user", "content": [IMAGE, ASK]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 18), return_tensors="pt")
    is_image = batch["input_ids"] == model.config.image_token_id
    assert is_image.sum() == 18
    answer = model.generate(**batch, **pixels, mm_token_type_ids=is_image.int(), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    pixels["pixel_values"] = -pixels["pixel_values"]
    other = model(**batch, **pixels, mm_token_type_ids=is_image.int()).logits[0, -1]
    pixels["pixel_values"] = -pixels["pixel_values"]
    assert not torch.allclose(other, model(**batch, **pixels, mm_token_type_ids=is_image.int()).logits[0, -1])


def test_text_only_model_loads_and_generates(tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen2"])
    batch = tokenizer(["accept or reject", "paper"], return_tensors="pt", padding=True, padding_side="left")
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.mark.parametrize("family", [*VISION_FAMILIES, "qwen2"])
def test_special_tokens_agree_between_tokenizer_and_configs(tiny_models, family):
    folder = tiny_models[family]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = tokenizer.convert_tokens_to_ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert generation["eos_token_id"] == [ids("<|im_end|>"), ids("<|endoftext|>")]
    if family != "qwen2":
        for key in ("image", "video"):
            assert config[f"{key}_token_id"] == ids(f"<|{key}_pad|>")
        for key in ("vision_start", "vision_end"):
            assert config[f"{key}_token_id"] == ids(f"<|{key}|>")
    assert config.get("text_config", config)["vocab_size"] > len(tokenizer)  # as in the real ones


def test_any_text_survives_the_tokenizer(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen3_vl"])
    text = 'The snare\'s "5-10mm"; ünïcode 日本 🙂\t\r\n\n  {"point_2d": [1, 2]}'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("upper-left; red; colonoscopy")["input_ids"]) <= 6  # answers are words, not letters


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen2.5-vl"])
def test_a_real_tokenizer_can_be_taken_over(tiny_models, name):
    source = shared_data(f"tokenizers/{name}")
    family = {"qwen3-vl": "qwen3_vl", "qwen2.5-vl": "qwen2_5_vl"}[name]
    folder = tiny_models.build(family, tokenizer_from=source, hidden_size=32, tie_word_embeddings=True)
    text = "How many instrumnets are in the image? <|im_start|>"
    real, taken = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    assert taken(text)["input_ids"] == real(text)["input_ids"]
    assert json.loads((folder / "config.json").read_text())["image_token_id"] == 151655
    assert AutoModelForImageTextToText.from_pretrained(folder).config.tie_word_embeddings


def test_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path):
    tiny_model.write_tiny_model(tmp_path / "a", "qwen3_vl", seed=1)
    tiny_model.write_tiny_model(tmp_path / "b", "qwen3_vl", seed=1)
    tiny_model.write_tiny_model(tmp_path / "c", "qwen3_vl", seed=2)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def test_weights_are_saved_in_the_dtype_asked_for(tmp_path):
    folder = tiny_model.write_tiny_model(tmp_path / "model", "qwen2_vl", dtype="bfloat16")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert AutoModelForImageTextToText.from_pretrained(folder).dtype == torch.bfloat16


def test_existing_folder_unknown_family_and_unknown_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hidden_size"):
        tiny_model.write_tiny_model(tmp_path / "new", "qwen3_vl", hiden_size=32)
    with pytest.raises(ValueError, match="exists"):
        tiny_model.write_tiny_model(tmp_path, "qwen3_vl")
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        tiny_model.write_tiny_model(tmp_path / "new", "qwen2.5_vl")


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_teachable_weights_let_images_reach_the_answer(tmp_path, family, tied):
    """Two images must change the logits by as much as they vary from token to token, and logits must go beyond ±1."""
    folder = tiny_model.write_tiny_model(tmp_path / "model", family, teachable=True, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor, config = AutoImageProcessor.from_pretrained(folder), model.config
    side = processor.patch_size * 4
    ids = torch.tensor([[config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id, 70]])
    logits = []
    for color in ("red", "blue"):
        pixels = processor(images=[Image.new("RGB", (side, side), color)], return_tensors="pt")
        is_image = (ids == config.image_token_id).int()
        with torch.no_grad():
            logits.append(model(input_ids=ids, **pixels, mm_token_type_ids=is_image).logits[0, -1])
    assert logits[0].std() > 1
    assert (logits[0] - logits[1]).std() > 0.2
