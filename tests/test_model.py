"""The model is the published one; only what is to be trained can move, and nothing is computed that is not used."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO_ROOT
from safetensors.torch import load_file, save_file
from support.tiny_runs import (
    FAMILIES,
    build_items,
    calls_to,
    largest_relative_difference,
    loss_and_gradients,
    tiny_run,
    vqa_samples,
)
from torch import nn
from transformers import AutoImageProcessor

import model as modeling
from batches import collate, weightless
from config import Lora
from errors import UserError
from images import letterbox, open_image
from model import AnswerLoss, attach_lora, group_of, load_base, load_tokenizer, prepare_training, trainable_parameters
from templates import IGNORE

LANGUAGE, VISION, PROJECTOR = modeling.LANGUAGE, modeling.VISION, modeling.PROJECTOR
MLP = {"gate_proj", "up_proj", "down_proj"}
LAYER_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"} | MLP
RECURRENT_PARTS = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"} | MLP


def linear_layers(run) -> list[str]:
    """The last names of the language model's linear layers."""
    return [*LAYER_PARTS, *RECURRENT_PARTS] if run.family.is_recurrent else [*LAYER_PARTS]


def linear_count(run) -> int:
    return 3 * len(RECURRENT_PARTS) + len(LAYER_PARTS) if run.family.is_recurrent else 2 * len(LAYER_PARTS)


@pytest.fixture(params=FAMILIES)
def run(request, tiny_models):
    return tiny_run(tiny_models, request.param)


def batch_of(run, samples, share_prefix=True, generation=False, **changes) -> dict:
    items, images = build_items(run.encoder(**changes), samples, generation)
    return collate(items, images, share_prefix, run.tokenizer.pad_token_id)


def fresh(run, dtype=torch.float32, **changes):
    """The model as train.py prepares it."""
    config = replace(run.config, **changes)
    return prepare_training(load_base(config.model_name, dtype), config)


# --------------------------------------------------------------------------------------------------- the same model


def own_loss(run, sample) -> float:
    """The loss that transformers' own forward gives for one sample, positions and pixels worked out by itself."""
    (item,), _ = build_items(run.encoder(), [sample])
    processor = AutoImageProcessor.from_pretrained(run.model_folder, backend="pil")
    images = [letterbox(open_image(run.folder / path), run.config.image_size)[0] for path in item.images]
    ids = torch.from_numpy(item.input_ids)[None]
    with torch.no_grad():
        logits = run.model()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == run.family.image_token_id).int(),
            **processor(images=images, return_tensors="pt"),
        ).logits[0]
    labels = torch.from_numpy(item.labels)
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum").item()


def test_the_loss_is_that_of_transformers_own_forward_pass(run):
    loss = AnswerLoss(run.model(), run.family)
    for sample in (vqa_samples(1, 1)[0], vqa_samples(3, 1, images_each=3)[0]):
        with torch.no_grad():
            assert loss(batch_of(run, [sample])).item() == pytest.approx(own_loss(run, sample), rel=1e-5)


def test_the_patch_embedding_as_a_matrix_product_equals_the_convolution(run):
    base = load_base(run.config.model_name, torch.float64)
    patch_embed = base.model.visual.patch_embed
    assert isinstance(patch_embed.proj, nn.Conv3d)
    patches = modeling.normalise_patches(batch_of(run, vqa_samples())["patches"], run.family).double()
    by_convolution = type(patch_embed).forward(patch_embed, patches)
    assert torch.allclose(patch_embed(patches), by_convolution, rtol=0, atol=1e-12)


def test_at_step_0_the_adapted_model_equals_the_base(run):
    batch = batch_of(run, vqa_samples())
    base = load_base(run.config.model_name, torch.float32)
    with torch.no_grad():
        before = AnswerLoss(base, run.family)(batch)
        after = AnswerLoss(fresh(run).eval(), run.family)(batch)
    assert torch.equal(before, after)


# ------------------------------------------------------------------------------------------- nothing that is not used


def test_frozen_vision_runs_without_gradients_once_per_distinct_image(run):
    visual = run.model().get_base_model().model.visual
    for share_prefix in (True, False):
        with calls_to(visual.patch_embed) as calls:
            batch = batch_of(run, vqa_samples(images=3, questions=4), share_prefix)
            loss_and_gradients(AnswerLoss(run.model(), run.family), batch)
        (((patches, *_), _, grad_enabled),) = calls
        assert len(patches) == 3 * (run.config.image_size // run.family.patch_size) ** 2 and not grad_enabled


def test_logits_are_computed_at_supervised_positions_only(run):
    batch = batch_of(run, vqa_samples())
    with calls_to(run.model().get_base_model().lm_head) as calls, torch.no_grad():
        AnswerLoss(run.model(), run.family)(batch)
    (((hidden,), _, _),) = calls
    assert hidden.numel() == batch["answer_tokens"] * hidden.shape[-1] and batch["answer_tokens"] < 100


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, False) for name in FAMILIES), ("qwen3_vl", True)])
def test_the_last_mlp_runs_at_supervised_positions_only_and_loss_and_gradients_are_as_if_it_ran_everywhere(
    tiny_models, monkeypatch, name, checkpointing
):
    def everywhere(self, hidden, mlp_places, **inputs):
        return modeling.at_places(type(self).forward(self, hidden, **inputs), mlp_places)[None]

    run = tiny_run(tiny_models, name, layers=4)  # DeepStack reaches two of them
    model = run.fresh_model(torch.float64, gradient_checkpointing=checkpointing).train()
    loss, batch = AnswerLoss(model, run.family), batch_of(run, vqa_samples())
    with calls_to(modeling.all_text_layers(model)[-1].mlp) as calls:
        value, gradients = loss_and_gradients(loss, batch)
    assert [args[0].shape[:2] for args, _, _ in calls] == [(1, batch["answer_tokens"])]
    monkeypatch.setattr(modeling, "_last_layer", everywhere)
    expected, of_all = loss_and_gradients(loss, batch)
    assert value == pytest.approx(expected, rel=1e-12)
    assert largest_relative_difference(gradients, of_all) < 1e-9


def test_no_gradient_passes_through_a_language_model_of_which_nothing_is_trained(run):
    model = run.fresh_model(torch.float32).train().requires_grad_(False)
    batch = batch_of(run, vqa_samples())
    assert not modeling.states_at(model, batch, run.family, batch["supervised"]).requires_grad


def test_each_image_reaches_the_rows_that_show_it(run):
    """Rows refer to distinct images by index; a wrong index would train on the wrong image without an error."""
    samples = vqa_samples(3, 2)
    mixed = [samples[0], samples[4], samples[2], samples[5]]
    loss = AnswerLoss(run.model(), run.family)
    with torch.no_grad():
        together = loss(batch_of(run, mixed)).item()
        one_by_one = sum(loss(batch_of(run, [sample])).item() for sample in mixed)
    assert together == pytest.approx(one_by_one, rel=1e-6)


def test_a_pass_without_any_supervised_token_has_a_loss_of_zero_and_zero_gradients(run):
    items, images = build_items(run.encoder(), vqa_samples(1, 1))
    idle = collate([weightless(items[0])], images, True, run.tokenizer.pad_token_id)  # of a rank that has no question
    assert len(idle["supervised"]) == 0
    masked = collate(items, images, True, run.tokenizer.pad_token_id)
    masked["targets"] = torch.full_like(masked["targets"], IGNORE)
    for batch in (idle, masked):
        value, gradients = loss_and_gradients(AnswerLoss(run.model(), run.family), batch)
        assert value == 0 and gradients and not any(gradient.any() for gradient in gradients.values())


def test_gradient_checkpointing_changes_no_gradient(run):
    batch = batch_of(run, vqa_samples())
    results = []
    for on in (False, True):
        model = fresh(run, lora=Lora(r=4, alpha=8, dropout=0.0), gradient_checkpointing=on).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.01)
        with calls_to(model.get_base_model().model.language_model.layers[0].mlp) as calls:
            results.append(loss_and_gradients(AnswerLoss(model, run.family), batch))
        assert len(calls) == (2 if on else 1), "forward once more in the backward pass"
    assert results[0][0] == results[1][0]
    assert largest_relative_difference(results[0][1], results[1][1]) < 1e-6


# --------------------------------------------------------------------------------------------------- what is trained


def adapted_modules(model) -> set[str]:
    return {name.rsplit(".lora_", 1)[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_lora_sits_on_every_linear_layer_of_the_language_model_and_nowhere_else(run):
    model = fresh(run)
    modules = adapted_modules(model)
    assert {name.rsplit(".", 1)[1] for name in modules} == {*linear_layers(run)} and len(modules) == linear_count(run)
    assert all(".language_model.layers." in name for name in modules)
    assert set(trainable_parameters(model)) == {name for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"vision_frozen": False}, {LANGUAGE, VISION}),
        ({"projector_frozen": False}, {LANGUAGE, PROJECTOR}),
        ({"vision_frozen": False, "projector_frozen": False}, {LANGUAGE, VISION, PROJECTOR}),
    ],
)
def test_an_unfrozen_vision_tower_or_projector_is_adapted_too_and_gets_gradients(run, changes, groups):
    model = fresh(run, **changes)
    assert {group_of(name) for name in adapted_modules(model)} == groups
    base = load_base(run.config.model_name, torch.float32)
    linear = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and group_of(name) in groups
    }
    assert {name.removeprefix("base_model.model.") for name in adapted_modules(model)} == linear
    _, gradients = loss_and_gradients(AnswerLoss(model.train(), run.family), batch_of(run, vqa_samples()))
    assert gradients.keys() == trainable_parameters(model).keys(), "DDP waits for a gradient of every one of them"
    for group in groups:
        assert any(gradients[name].any() for name in gradients if "lora_B" in name and group_of(name) == group)


def test_the_adapter_added_in_the_product_equals_pefts_own_forward(run):
    model = fresh(run, torch.float64, lora=Lora(4, 12, 0.0)).double()
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    assert len(layers) == linear_count(run)
    for layer in layers:
        hidden = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
        inputs = [hidden, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results = []
        for forward in (layer.forward, lambda x, layer=layer: type(layer).forward(layer, x)):
            output = forward(hidden)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for own, pefts in zip(*results, strict=True):
            assert torch.allclose(own, pefts, rtol=1e-10, atol=1e-12)
        assert "forward" in vars(layer), "or the two forwards are one"
    hidden = torch.randn(1, 3, layers[0].in_features, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(layers[0](hidden), layers[0].base_layer(hidden))


def test_the_adapters_dropout_in_training_is_pefts_own(run):
    model = fresh(run, lora=Lora(4, 12, 0.5)).train()
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer"))
    hidden = torch.randn(2, 5, layer.in_features)
    outputs = []
    for forward in (layer.forward, lambda x: type(layer).forward(layer, x), layer.eval().forward):
        layer.train(len(outputs) < 2)
        torch.manual_seed(0)
        outputs.append(forward(hidden))
    own, pefts, evaluated = outputs
    assert torch.allclose(own, pefts, atol=1e-6) and not torch.allclose(own, evaluated, atol=1e-3)


def test_lora_without_a_match_is_an_error():
    with pytest.raises(UserError, match="no linear layer in the vision tower"):
        attach_lora(nn.ModuleDict({"other": nn.ReLU()}), Lora(), [VISION], seed=0)


def test_the_adapter_is_float32_on_a_bfloat16_base(run):
    model = fresh(run, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {t for name, t in types.items() if ".lora_" in name} == {torch.float32}
    assert {t for name, t in types.items() if ".lora_" not in name} == {torch.bfloat16}
    value, _ = loss_and_gradients(AnswerLoss(model.train(), run.family), batch_of(run, vqa_samples(1, 1)))
    assert 0 < value < 100


def test_the_same_seed_gives_the_same_adapter_on_every_rank_and_another_seed_another(run):
    first, again, other = (trainable_parameters(fresh(run, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def one_step(model, run, learning_rate: float) -> tuple[dict, dict]:
    """(weights before, after) two updates; the second moves what the first had to wait for (B = 0)."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = replace(run.config, learning_rate=learning_rate)
    optimizer = torch.optim.AdamW(modeling.optimizer_groups(model, config))
    for _ in range(2):
        AnswerLoss(model.train(), run.family)(batch_of(run, vqa_samples())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, dict(model.named_parameters())


def test_training_moves_every_adapter_tensor_and_leaves_the_base_bit_identical(run):
    before, after = one_step(fresh(run), run, 1e-3)
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == (".lora_" not in name), name


def test_full_fine_tuning_moves_float32_weights_at_2e6_where_bfloat16_ones_would_stay(run):
    """bfloat16 has 8 bits: next to a weight of 0.01 the nearest other value is 6e-5 away."""
    model = fresh(run, torch.bfloat16, finetuning="full")
    groups = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        groups[parameter.requires_grad].add((group_of(name), parameter.dtype))
    assert groups[True] == {(LANGUAGE, torch.float32)}
    assert groups[False] == {(VISION, torch.bfloat16), (PROJECTOR, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        before, after = one_step(model, run, 2e-6)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    large = before[name].abs() > 0.005
    update = (after[name] - before[name])[large]
    assert (update.abs() > 0).float().mean() > 0.95
    in_bfloat16 = before[name].bfloat16()[large]
    assert torch.equal(in_bfloat16 + update.bfloat16(), in_bfloat16)
    assert all(torch.equal(before[n], after[n]) for n in before if group_of(n) != LANGUAGE)


def test_norms_and_biases_have_no_weight_decay(run):
    model = fresh(run, finetuning="full")
    decayed, plain = modeling.optimizer_groups(model, replace(run.config, weight_decay=0.1))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith(("bias", "A_log")) for p in plain["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith(("bias", "A_log")) for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(trainable_parameters(model))


def test_the_parameter_table_counts_every_parameter_once(run):
    model = fresh(run)
    numbers = [
        [int(word.replace(",", "")) for word in line.split() if word[0].isdigit()]
        for line in modeling.parameter_table(model)
    ]
    assert numbers[-1][:2] == [sum(line[column] for line in numbers[:-1]) for column in (0, 1)]
    assert numbers[-1][0] == sum(parameter.numel() for parameter in model.parameters())
    assert numbers[-1][1] == sum(parameter.numel() for parameter in trainable_parameters(model).values())


# ------------------------------------------------------------------------------------------------------ bad folders


@pytest.fixture
def copied(tiny_models, tmp_path):
    """A copy of a tiny model to spoil."""
    return shutil.copytree(tiny_models["qwen3_vl"], tmp_path / "model")


def refused(function, folder, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(str(folder), *arguments)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_weights_or_with_half_of_them_is_an_error(copied):
    weights = load_file(copied / "model.safetensors")
    name = sorted(weights)[3]
    save_file({key: value for key, value in weights.items() if key != name}, copied / "model.safetensors")
    assert "1 missing weights, first " in refused(load_base, copied, torch.float32)
    save_file({**weights, name: weights[name][:-1].clone()}, copied / "model.safetensors")
    assert "cannot be loaded" in refused(load_base, copied, torch.float32)
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in refused(load_base, copied, torch.float32)
    (copied / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(load_base, copied, torch.float32)


def test_a_loaded_model_attends_without_cudnn(copied):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_base(str(copied), torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_older_transformers_is_refused_with_the_command_that_helps(copied, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(UserError, match=r"transformers 5\.9\.1 is too old; run: pip install -r requirements\.txt"):
        load_base(str(copied), torch.float32)


def test_a_tokenizer_without_a_chat_template_or_none_at_all_is_an_error(copied):
    (copied / "chat_template.jinja").unlink()
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no chat template" in refused(load_tokenizer, copied)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copied / name).unlink()
    assert "no tokenizer" in refused(load_tokenizer, copied), "transformers would make one without a vocabulary"
    (copied / "config.json").unlink()
    assert "no tokenizer" in refused(load_tokenizer, copied)


def test_code_that_lies_in_a_model_folder_is_never_run(copied):
    (copied / "evil.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\nfrom transformers import *\n")
    settings = json.loads((copied / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (copied / "config.json").write_text(json.dumps(settings))
    load_base(str(copied), torch.float32)
    assert not (copied / "ran").exists()


@pytest.mark.slow  # a process each, which imports torch and peft
@pytest.mark.parametrize(
    "command",
    [
        "from model import attach_lora; from config import Lora\n"
        "class Stop(Exception): pass\n"
        "import model\n"
        "def stop(*_): raise Stop\n"
        "model.lora_target_pattern = stop\n"
        "try: attach_lora(object(), Lora(), [], 0)\n"
        "except Stop: pass",
        "import checkpoint, errors, pathlib\n"
        "try: checkpoint._read_adapter_config(pathlib.Path('nowhere'))\n"
        "except errors.UserError: pass",
    ],
    ids=["training", "loading"],
)
def test_no_line_about_4_bit_kernels_where_none_are_used(command):
    run = subprocess.run([sys.executable, "-c", command], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
