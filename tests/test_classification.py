"""Classification: what the head reads, that it learns, what of the model moves and how fast, and every bad input."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from support.document_runs import COLOURS, document_config, losses, predictions, write_documents
from support.run_helpers import REPO, finish, log_rows, start

import classification
import evaluate
import inference
import sharding
import tasks
import train
from batches import collate, lay_out, passes
from checkpoint import TrainerState, has_lost_best, load_trained
from classification import ClassLoss, attach_head, class_logits
from config import load_config
from dataset import SampleEncoder
from distributed import Ranks
from errors import UserError
from family import load_family
from inference import classify_split
from model import base_of, group_of, load_base, load_tokenizer, optimizer_groups, prepare_training
from preflight import check_samples
from samples import SampleList

VISION = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def trained(documents, tiny_models, tmp_path_factory):
    """The folders of a text run of two epochs, full and LoRA, trained once."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("full", "lora"):
        config = document_config(
            documents,
            tiny_models["qwen2"],
            folder / name,
            finetuning=name,
            num_train_epochs=2,
            gradient_checkpointing=True,
        )
        train.main(["--config", str(config)])
    return folder


@pytest.fixture
def run(documents, tiny_models, tmp_path):
    """run(name, kind, family, **changes) trains in this process; returns the output folder."""

    def run(name, kind="text", family="qwen2", **changes):
        config = document_config(documents, tiny_models[family], tmp_path / name, kind, family, **changes)
        train.main(["--config", str(config)])
        return tmp_path / name

    return run


def encoder_of(documents, model, tmp_path, kind="text", family="qwen2", **changes):
    config = load_config(document_config(documents, model, tmp_path / "unused", kind, family, **changes))
    return SampleEncoder(config, load_family(config.model_name), load_tokenizer(config.model_name))


def with_random_head(model_folder, seed=0):
    model = load_base(str(model_folder), torch.float32)
    attach_head(model, 3, seed)
    torch.nn.init.normal_(model.cls_head.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


def batch_of(encoder, samples, share_prefix=True):
    images = {}
    for sample in samples:
        for path in encoder.images_of(sample):
            images[path] = encoder.load_image(path)
    items = [encoder.encode(s, [images[path] for path in encoder.images_of(s)]) for s in samples]
    return collate(items, images, share_prefix, encoder.tokenizer.pad_token_id)


# ---------------------------------------------------------------------------------------------------------- the head


def test_a_text_is_classified_by_the_final_hidden_state_of_its_last_token(documents, tiny_models, tmp_path):
    encoder = encoder_of(documents, tiny_models["qwen2"], tmp_path)
    model = with_random_head(tiny_models["qwen2"])
    texts = ["paper accept", "the number of words is small here as it was in that paper", "title"]
    samples = [{"id": str(n), "text": text, "label": 0} for n, text in enumerate(texts)]
    logits = class_logits(model, batch_of(encoder, samples), encoder.family)
    for sample, found in zip(samples, logits, strict=True):
        prompt = [{"role": "user", "content": f"Classify this document.\n\n{sample['text']}"}]
        ids = encoder.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        expected = hidden @ model.cls_head.weight.T + model.cls_head.bias
        assert torch.allclose(found, expected, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 0.1  # the texts do make a difference


@pytest.mark.parametrize("family", VISION)
def test_pages_are_classified_alike_alone_in_a_batch_and_behind_a_shared_prefix(
    family, documents, tiny_models, tmp_path
):
    encoder = encoder_of(documents, tiny_models[family], tmp_path, "page", family)
    model = with_random_head(tiny_models[family])
    two, other = ["train-0-1.png", "train-0-2.png"], ["train-1-2.png"]
    samples = [
        {"id": "a", "images": two, "text": "the paper", "label": 0},
        {"id": "b", "images": other, "label": 0},
        {"id": "c", "images": two, "text": "the number of words is small", "label": 0},
    ]
    alone = torch.cat([class_logits(model, batch_of(encoder, [sample]), encoder.family) for sample in samples])
    batch = batch_of(encoder, samples)
    assert batch["slots"].shape == (2, 2) and batch_of(encoder, samples, share_prefix=False)["slots"].shape == (3, 1)
    for share_prefix in (False, True):
        together = class_logits(model, batch_of(encoder, samples, share_prefix), encoder.family)
        assert torch.allclose(together, alone, atol=1e-5)
    assert (alone[0] - alone[2]).abs().max() > 1e-3 and (alone[0] - alone[1]).abs().max() > 1e-3


def test_each_logit_goes_to_its_own_document_when_the_longest_rows_of_a_pass_come_first(
    documents, tiny_models, tmp_path
):
    encoder = encoder_of(documents, tiny_models["qwen2"], tmp_path)
    model = with_random_head(tiny_models["qwen2"])
    texts = ["title", "the number of words is small here as it was in that paper", "the number of words"]
    items = [encoder.encode({"id": text, "text": text, "label": 0}, []) for text in texts]
    alone, together = (
        [class_logits(model, collate(part, {}, True, 0, rows), encoder.family) for part, rows in parts]
        for parts in ([([item], None) for item in items], [(items, passes(lay_out(items, True), 10_000)[0])])
    )
    assert torch.allclose(together[0], torch.cat(alone), atol=1e-5)


def test_the_loss_is_the_sum_over_the_documents_and_the_vocabulary_is_never_scored(documents, tiny_models, tmp_path):
    encoder = encoder_of(documents, tiny_models["qwen2"], tmp_path, num_labels=3)
    model = with_random_head(tiny_models["qwen2"])
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits over the vocabulary"))
    samples = [{"id": str(n), "text": "paper " * (n + 1), "label": n} for n in range(3)]
    batch = batch_of(encoder, samples)
    loss = ClassLoss(model, encoder.family)
    expected = -class_logits(model, batch, encoder.family).log_softmax(-1)[range(3), [0, 1, 2]].sum()
    assert batch["answer_tokens"] == 3 and torch.isclose(loss(batch), expected)


def test_the_head_is_the_same_for_a_seed_and_float32_on_a_bfloat16_model(tiny_models):
    weights = []
    for seed in (1, 1, 2):
        model = load_base(str(tiny_models["qwen2"]), torch.bfloat16)
        torch.manual_seed(len(weights))
        attach_head(model, 2, seed)
        weights.append(model.cls_head.weight)
        assert model.cls_head.weight.dtype == torch.float32 and not model.cls_head.bias.any()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert float(weights[0].std()) == pytest.approx(model.config.initializer_range, rel=0.25)


# ------------------------------------------------------------------------------------------------------- it learns


def test_a_label_word_planted_in_texts_is_learned(documents, tiny_models, tmp_path, capsys):
    config = document_config(documents, tiny_models["qwen2"], tmp_path / "out", num_train_epochs=6)
    train.main(["--config", str(config)])
    log = capsys.readouterr().out
    line = "[INFO] Using custom classification optimizer with backbone_lr=2.00e-03, head_lr=3.00e-03"
    assert line in log.splitlines()
    assert "The test curve is reported and never used to choose: the best epoch is the best on val." in log
    scores = evaluate_run(config)
    assert scores["predict_accuracy"] >= 0.95, scores
    assert scores["predict_auroc"] >= 0.95 and scores["predict_samples"] == 24
    for name in "accuracy f1 precision recall auroc brier ece".split():
        assert len(scores[f"predict_{name}_ci"]) == 2

    results = tmp_path / "out_results"
    samples = json.loads((documents / "text_test.json").read_text())
    for row, sample in zip(predictions(results), samples, strict=True):
        assert row.items() >= sample.items(), "every key of the sample goes through"
        assert row["true_label"] == sample["label"]
        assert row["predicted_label"] == max((0, 1), key=lambda label: row["logits"][label])
        expected = [math.exp(x) / sum(map(math.exp, row["logits"])) for x in row["logits"]]
        assert row["probabilities"] == pytest.approx(expected)
    history = json.loads((results / "all_results.json").read_text())["history"]
    assert [row["epoch"] for row in history] == list(range(1, 7))
    for row in history:
        assert row.keys() >= {"eval_loss", "eval_accuracy", "test_loss", "test_accuracy"}
    best = max(history, key=lambda row: (row["eval_accuracy"], -row["eval_loss"]))
    assert scores["predict_accuracy"] == best["test_accuracy"], "the result is the best epoch on val"
    for name in ("reliability.png", "loss_curves.png"):
        with Image.open(results / name) as image:
            assert min(image.size) > 200


@pytest.mark.parametrize("family", [*VISION[:3], pytest.param(VISION[3], marks=pytest.mark.slow)])
def test_a_label_drawn_on_the_second_page_is_learned_and_the_vision_tower_stays_as_it_is(family, run, tiny_models):
    output = run("out", "page", family, num_train_epochs=4, learning_rate=5e-3)
    assert log_rows(output, "eval_loss")[-1]["test_accuracy"] >= 0.95
    before, after = load_file(tiny_models[family] / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    vision = [name for name in before if "visual" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers.1.mlp" in name for name in moved) and any("self_attn" in name for name in moved)
    assert "lm_head.weight" not in moved


def evaluate_run(config, *arguments):
    evaluate.main(["--config", str(config), *map(str, arguments)])
    results = load_config(config).results_dir
    with open(f"{results}/predict_results.json") as file:
        return json.load(file)


# --------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("name", ["full", "lora"])
def test_reloaded_logits_are_those_of_the_trained_model(name, trained, documents):
    """From the final folder and from the checkpoint; the loss in the log is the trained model's."""
    config = load_config(trained / f"{name}.yaml")
    encoder = SampleEncoder(config, load_family(config.model_name), load_tokenizer(config.model_name))
    samples = SampleList(json.loads((documents / "text_test.json").read_text()), "test")
    best = load_state(trained / name)["best_step"]
    found = []
    for folder in (trained / name, trained / name / f"checkpoint-{best}"):
        model = load_trained(config, folder, torch.device("cpu"))
        found.append(classify_split(ClassLoss(model, encoder.family), samples, encoder, ALONE))
    assert found[0] == found[1]
    logits = torch.tensor([row["logits"] for row in found[0]], dtype=torch.float64)
    labels = torch.tensor([row["true_label"] for row in found[0]])
    logged = next(row for row in log_rows(trained / name, "test_loss") if row["step"] == best)
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == logged["test_loss"]
    head = load_file(trained / name / "cls_head.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in head.items()} == {"weight": (2, 64), "bias": (2,)}
    assert all(tensor.dtype == torch.float32 for tensor in head.values())


def load_state(output):
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())


def test_a_fully_trained_folder_loads_plainly_and_holds_no_head(trained):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(trained / "full", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(model.model.norm.weight, load_file(trained / "full" / "model.safetensors")["model.norm.weight"])


def test_a_folder_of_bfloat16_weights_says_so_whatever_the_masters_type(run, monkeypatch):
    """On GPUs, the weights are written in the type that computed, and the masters are float32."""
    from transformers import AutoModelForCausalLM

    full_state_dict = sharding.full_state_dict
    monkeypatch.setattr(
        sharding,
        "full_state_dict",
        lambda *args, **kw: {n: t.bfloat16() for n, t in full_state_dict(*args, **kw).items()},
    )
    output = run("bfloat16", finetuning="full", num_train_epochs=1)
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16


def test_lora_trains_adapter_and_head_and_saves_no_base_weight(trained, tiny_models):
    folder = trained / "lora"
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name for name in adapter) and not (folder / "model.safetensors").exists()
    assert all(tensor.any() for tensor in adapter.values()), "every B has left zero"
    fresh = load_base(str(tiny_models["qwen2"]), torch.float32)
    attach_head(fresh, 2, seed=42)
    assert not torch.equal(fresh.cls_head.weight, load_file(folder / "cls_head.safetensors")["weight"])


def test_a_resumed_run_ends_like_an_uninterrupted_one(run):
    whole = run("whole", finetuning="lora", save_steps=5)
    cut = run("cut", finetuning="lora", save_steps=5)
    for path in [cut / "adapter_model.safetensors", *cut.glob("checkpoint-*")]:
        if path.name != "checkpoint-5":
            path.rename(path.with_name(f"gone-{path.name}"))
    run("cut", finetuning="lora", save_steps=5)
    assert losses(cut) == losses(whole)
    for name in ("adapter_model.safetensors", "cls_head.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_each_curve_is_that_of_its_own_split(documents, tiny_models, tmp_path, monkeypatch):
    rows = {
        "the val samples": [{"logits": [0.0, 0.0], "true_label": 1, "correct": False}],
        "the test samples": [{"logits": [0.0, math.log(3)], "true_label": 1, "correct": True}],
    }
    monkeypatch.setattr(inference, "classify_split", lambda loss, samples, *_: rows[samples])
    encoder = encoder_of(documents, tiny_models["qwen2"], tmp_path)
    splits = {"train": None, "val": "the val samples", "test": "the test samples"}
    assert inference.scores_while_training(None, splits, encoder, ALONE, lambda: False) == {
        "eval_loss": pytest.approx(math.log(2)),
        "eval_accuracy": 0,
        "test_loss": pytest.approx(math.log(4 / 3)),
        "test_accuracy": 1,
    }


def test_the_best_epoch_is_chosen_on_val_and_is_the_result_whatever_test_says(run, monkeypatch):
    accuracies = iter([(0.5, 0.9, 0.1), (0.8, 0.7, 0.2), (0.8, 0.6, 0.3), (0.7, 0.5, 1.0)])

    def scores(*_):
        accuracy, loss, on_test = next(accuracies)
        return {"eval_accuracy": accuracy, "eval_loss": loss, "test_accuracy": on_test, "test_loss": 1 - on_test}

    monkeypatch.setattr(train, "scores_while_training", scores)
    output = run("out", num_train_epochs=4, save_total_limit=1)
    assert load_state(output)["best_step"] == 36  # of 12 steps an epoch: the third, by its loss
    best = load_file(output / "checkpoint-36" / "cls_head.safetensors")
    last = load_file(output / "checkpoint-48" / "cls_head.safetensors")
    final = load_file(output / "cls_head.safetensors")
    assert torch.equal(final["weight"], best["weight"]) and not torch.equal(final["weight"], last["weight"])
    weights, name = load_file(output / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], load_file(output / "checkpoint-36" / "trained_weights.safetensors")[name])


def test_the_best_epoch_is_the_result_whatever_the_steps_that_are_saved(run, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(
        train, "scores_while_training", lambda *_: {"eval_accuracy": next(accuracies), "eval_loss": 0.5}
    )
    output = run("out", num_train_epochs=3, save_steps=1000)
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-36"]
    best = load_file(output / "checkpoint-12" / "cls_head.safetensors")
    assert torch.equal(load_file(output / "cls_head.safetensors")["weight"], best["weight"])


def test_a_run_resumed_into_another_folder_ends_with_the_best_of_its_own_epochs(run, monkeypatch, tmp_path, documents):
    accuracies = iter([0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(
        train, "scores_while_training", lambda *_: {"eval_accuracy": next(accuracies), "eval_loss": 0.5}
    )
    first = run("first", num_train_epochs=2)
    # as if it had been stopped after its second epoch of four
    state = first / "checkpoint-24" / "trainer_state.json"
    state.write_text(state.read_text().replace('"num_train_epochs": 2', '"num_train_epochs": 4'))
    assert load_state(first)["best_step"] == 12
    other = run("other", num_train_epochs=4, resume=str(first / "checkpoint-24"))
    best = load_file(other / "checkpoint-36" / "cls_head.safetensors")
    assert load_state(other)["best_step"] == 36
    assert torch.equal(load_file(other / "cls_head.safetensors")["weight"], best["weight"])


def test_an_evaluation_that_was_still_due_keeps_its_best_in_the_folder_it_goes_on_in(run, monkeypatch):
    def stopped(*_):
        raise inference.Stopped

    monkeypatch.setattr(train, "scores_while_training", stopped)
    first = run("first", num_train_epochs=2)
    assert json.loads((first / "PREEMPTED").read_text())["step"] == 12
    accuracies = iter([0.9, 0.5])
    monkeypatch.setattr(
        train, "scores_while_training", lambda *_: {"eval_accuracy": next(accuracies), "eval_loss": 0.5}
    )
    other = run("other", num_train_epochs=2, resume=str(first / "checkpoint-12"))
    best = load_file(first / "checkpoint-12" / "cls_head.safetensors")
    assert torch.equal(load_file(other / "cls_head.safetensors")["weight"], best["weight"])


def test_only_a_checkpoint_of_the_runs_own_folder_is_its_best(tmp_path):
    out, state = tmp_path / "out", TrainerState(step=24, best_step=12)
    assert has_lost_best(state, str(out / "checkpoint-24"), out), "it is gone"
    (out / "checkpoint-12").mkdir(parents=True)
    (out / "checkpoint-12" / "trainer_state.json").write_text(json.dumps(vars(TrainerState(step=12))))
    assert not has_lost_best(state, str(out / "checkpoint-24"), out)
    assert has_lost_best(state, str(tmp_path / "other" / "checkpoint-24"), out), "another run's of the same step"
    assert not has_lost_best(TrainerState(step=24), str(tmp_path / "other" / "checkpoint-24"), out)


@pytest.mark.parametrize("head", [True, False])
def test_a_run_that_starts_from_an_adapter_takes_its_head_along(head, trained, run, tmp_path, capsys):
    start_from = tmp_path / "adapter"
    shutil.copytree(trained / "lora", start_from, ignore=shutil.ignore_patterns("checkpoint-*"))
    if not head:
        (start_from / "cls_head.safetensors").unlink()
    rates = {"learning_rate": 1e-12, "backbone_learning_rate": 1e-12}
    output = run("out", finetuning="lora", init_adapter=str(start_from), **rates)
    assert (", and its head" if head else ", and a fresh head") in capsys.readouterr().out
    before, after = (load_file(f / "cls_head.safetensors")["weight"] for f in (trained / "lora", output))
    assert torch.allclose(before, after, atol=1e-9) == head


# ------------------------------------------------------------------------------------------------- two learning rates


def test_both_rates_follow_transformers_schedule_at_every_step(trained):
    from transformers import get_cosine_schedule_with_warmup

    rows = log_rows(trained / "full")
    head, backbone = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [head], "lr": 3e-3}, {"params": [backbone], "lr": 2e-3}])
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, len(rows))
    assert len(rows) == 24
    for row in rows:
        assert [row["learning_rate"], row["backbone_learning_rate"]] == [
            group["lr"] for group in optimizer.param_groups
        ]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("backbone", [None, 2e-6])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_vl"])
def test_each_parameter_has_its_rate_and_norms_and_biases_no_decay(family, backbone, documents, tiny_models, tmp_path):
    kind = "text" if family == "qwen2" else "page"
    path = document_config(documents, tiny_models[family], tmp_path / "out", kind, family, learning_rate=2e-5,
                           backbone_learning_rate=backbone, weight_decay=0.1)  # fmt: skip
    config = load_config(path)
    base = load_base(config.model_name, torch.float32)
    attach_head(base, 2, 0)
    model = prepare_training(base, config)
    group_of_parameter = {id(p): group for group in optimizer_groups(model, config) for p in group["params"]}
    trained = dict(model.named_parameters())
    for name, parameter in trained.items():
        is_trained = group_of(name) in ("language model", "head") and name != "lm_head.weight"
        assert parameter.requires_grad == is_trained == (id(parameter) in group_of_parameter), name
        if is_trained:
            group = group_of_parameter[id(parameter)]
            assert group["lr"] == (2e-5 if "cls_head" in name or backbone is None else 2e-6), name
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name
    expected = "2.00e-05" if backbone is None else "2.00e-06"
    line = f"[INFO] Using custom classification optimizer with backbone_lr={expected}, head_lr=2.00e-05"
    assert classification.notes(config)[0] == line


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_at_backbone_rate_0_the_head_alone_moves(finetuning, run, tiny_models):
    output = run("out", finetuning=finetuning, backbone_learning_rate=0, learning_rate=3e-2, num_train_epochs=2)
    rows = log_rows(output)
    assert {row["backbone_learning_rate"] for row in rows} == {0.0} and rows[-1]["loss"] < rows[0]["loss"]
    if finetuning == "full":
        before, after = load_file(tiny_models["qwen2"] / "model.safetensors"), load_file(output / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    else:
        adapter = load_file(output / "adapter_model.safetensors")
        assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_rate_of_2e_6_moves_the_float32_weights_of_a_bfloat16_model_and_would_not_move_bfloat16_ones(
    documents, tiny_models, tmp_path
):
    config = load_config(document_config(documents, tiny_models["qwen2"], tmp_path / "out", learning_rate=2e-6))
    base = load_base(config.model_name, torch.bfloat16)
    attach_head(base, 2, 0)
    model = prepare_training(base, config)
    master = model.model.layers[0].mlp.up_proj.weight
    assert master.dtype == torch.float32
    for weight, share_that_moves in ((master, 1.0), (torch.nn.Parameter(master.detach().bfloat16()), 0.0)):
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=2e-6, weight_decay=0.0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        large = before.abs() > 2e-3  # half of bfloat16's step there is 4e-6, and larger above
        moved = (weight.detach() != before)[large]
        assert float(moved.float().mean()) == share_that_moves


def test_backbone_learning_rate_is_refused_for_other_tasks(documents, tiny_models, tmp_path):
    path = document_config(documents, tiny_models["qwen2"], tmp_path / "out", task="vqa", num_labels=None)
    with pytest.raises(UserError, match="'backbone_learning_rate' is only valid for task 'cls'"):
        load_config(path)


# ---------------------------------------------------------------------------------------------------------- long texts


def test_a_long_text_loses_its_end_and_never_the_instruction(documents, tiny_models, tmp_path, capsys):
    encoder = encoder_of(documents, tiny_models["qwen2"], tmp_path, max_tokens=140, template="paper_decision")
    words = [f"word {number}" for number in range(200)]
    item = encoder.encode({"id": "long", "text": " ".join(words), "label": 0}, [])
    whole = encoder_of(documents, tiny_models["qwen2"], tmp_path, max_tokens=5000, template="paper_decision").encode(
        {"id": "long", "text": " ".join(words), "label": 0}, []
    )
    assert len(item.input_ids) == 140 and item.cut_tokens == len(whole.input_ids) - 140
    text = encoder.tokenizer.decode(item.input_ids)
    assert "Judge whether it was accepted or rejected." in text and "word 0 word 1" in text and "word 199" not in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    kept = text.split("rejected.\n\n")[1].split("<|im_end|>")[0]
    assert " ".join(words).startswith(kept.rstrip("\ufffd"))

    samples = [{"id": "short", "text": "paper", "label": 0}, {"id": "long", "text": " ".join(words), "label": 1}]
    check_samples(SampleList(samples, "papers.json"), encoder)
    assert f"papers.json: 1 of 2 texts are longer than max_tokens and are cut at the end, by {item.cut_tokens:,}" in (
        capsys.readouterr().out
    )
    model = with_random_head(tiny_models["qwen2"])
    rows = classify_split(ClassLoss(model, encoder.family), SampleList(samples, "s"), encoder, ALONE)
    assert [row["cut_tokens"] for row in rows] == [0, item.cut_tokens]
    assert tasks.cls.score([{**row, "probabilities": [0.5, 0.5]} for row in rows], encoder.config)["cut_texts"] == 1


def test_pages_are_never_cut_and_neither_is_the_instruction(documents, tiny_models, tmp_path):
    pages = ["train-0-1.png", "train-0-2.png"]
    encoder = encoder_of(documents, tiny_models["qwen3_vl"], tmp_path, "page", "qwen3_vl", max_tokens=40)
    images = [encoder.load_image(page) for page in pages]
    item = encoder.encode({"id": "x", "images": pages, "text": "paper " * 200, "label": 0}, images)
    assert (item.input_ids == encoder.family.image_token_id).sum() == 8 and len(item.input_ids) == 40
    encoder = encoder_of(documents, tiny_models["qwen3_vl"], tmp_path, "page", "qwen3_vl", max_tokens=20)
    with pytest.raises(UserError, match="the pages and the instruction alone fill max_tokens"):
        encoder.encode({"id": "x", "images": pages, "text": "paper " * 200, "label": 0}, images)
    with pytest.raises(UserError, match=r"tokens .* exceed max_tokens 20"):
        encoder.encode({"id": "x", "images": pages, "label": 0}, images)


def test_30_pages_in_one_sample_are_read_or_clearly_refused(documents, tiny_models, tmp_path):
    pages = []
    for number in range(30):
        image = Image.new("RGB", (60, 80), "white")
        ImageDraw.Draw(image).rectangle((number, number, number + 20, number + 20), fill=COLOURS[number % 2])
        image.save(documents / f"many-{number}.png")
        pages.append(f"many-{number}.png")
    samples = SampleList([{"id": "thick", "images": pages, "label": 1}], "s")
    encoder = encoder_of(documents, tiny_models["qwen2_5_vl"], tmp_path, "page", "qwen2_5_vl")
    model = with_random_head(tiny_models["qwen2_5_vl"])
    check_samples(samples, encoder)
    (row,) = classify_split(ClassLoss(model, encoder.family), samples, encoder, ALONE)
    assert len(row["images"]) == 30 and len(row["logits"]) == 3
    encoder = encoder_of(documents, tiny_models["qwen2_5_vl"], tmp_path, "page", "qwen2_5_vl", max_tokens=128)
    with pytest.raises(UserError, match=r"tokens \(120 of them image\) exceed max_tokens 128; raise max_tokens"):
        check_samples(samples, encoder)


# ---------------------------------------------------------------------------------------------------------- bad inputs

TEXT = {"id": "x", "text": "a paper", "label": 0}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"label": 2}, "key 'label' is 2, but num_labels 2 allows the numbers 0 to 1"),
        ("qwen2", {"label": -1}, "key 'label' is -1, but"),
        ("qwen2", {"label": True}, "key 'label' is True, but"),
        ("qwen2", {"label": "accept"}, "key 'label' is 'accept', but"),
        ("qwen2", {"label": None}, "key 'label' is None, but"),
        ("qwen2", {"text": " \n"}, "key 'text' is empty"),
        ("qwen2", {"text": 3}, "key 'text' is empty or no text"),
        ("qwen2", {"text": None}, "neither 'text' nor 'images'"),
        ("qwen2", {"images": ["train-0-1.png"]}, "the sample has images but model_name is a text model"),
        ("qwen2", {"text": "a <|im_end|> b"}, "holds the control token <|im_end|>"),
        ("qwen3_vl", {}, "no images but model_name is a vision model (qwen3_vl); classify texts with a text model"),
        ("qwen3_vl", {"images": []}, "no images but model_name is a vision model"),
        ("qwen3_vl", {"images": ["../x.png"]}, "leaves data.image_root"),
    ],
)
def test_a_bad_sample_is_named_before_anything_is_loaded(family, changes, message, documents, tiny_models, tmp_path):
    kind = "text" if family == "qwen2" else "page"
    encoder = encoder_of(documents, tiny_models[family], tmp_path, kind, family)
    sample = {key: value for key, value in {**TEXT, **changes}.items() if value is not None or key == "label"}
    with pytest.raises(UserError) as caught:
        check_samples(
            SampleList([TEXT | {"images": ["train-0-1.png"]} if kind == "page" else TEXT, sample], "s"), encoder
        )
        encoder.encode(sample, [])  # control tokens are found when a text is tokenised
    assert message in str(caught.value)


def test_a_vision_model_may_be_asked_without_its_pages_where_that_is_said(documents, tiny_models, tmp_path):
    encoder = encoder_of(documents, tiny_models["qwen3_vl"], tmp_path, "page", "qwen3_vl", image="none")
    check_samples(SampleList([TEXT], "s"), encoder)
    with pytest.raises(UserError, match="neither 'text' nor 'images'"):
        check_samples(SampleList([{"id": "x", "images": ["train-0-1.png"], "label": 0}], "s"), encoder)


def test_the_same_document_in_two_splits_is_refused(documents, tiny_models, tmp_path):
    train_file = json.loads((documents / "text_train.json").read_text())
    leaked = tmp_path / "leaked.json"
    leaked.write_text(json.dumps([{**train_file[3], "id": "again", "text": train_file[3]["text"].upper()}]))
    path = document_config(documents, tiny_models["qwen2"], tmp_path / "out")
    with pytest.raises(UserError, match=r"1 text\(s\) stand in more than one split: .*train-3.*again"):
        train.main(["--config", str(path), f"data.test={leaked}"])
    pages = json.loads((documents / "page_train.json").read_text())
    leaked.write_text(json.dumps([{**pages[3], "id": "again"}]))
    path = document_config(documents, tiny_models["qwen3_vl"], tmp_path / "out", "page", "qwen3_vl")
    with pytest.raises(UserError, match=r"1 image\(s\) stand in more than one split"):
        train.main(["--config", str(path), f"data.test={leaked}"])


def test_another_num_labels_than_the_head_has_is_refused(trained):
    path = trained / "lora.yaml"
    with pytest.raises(UserError, match=r"2 misshapen weights, first bias \(\[2\], not \[3\]\)"):
        evaluate.main(["--config", str(path), "num_labels=3"])
    with pytest.raises(UserError, match=r"checkpoint-24 was trained with another config .*num_labels: 2 -> 3"):
        train.main(["--config", str(path), "num_labels=3", "num_train_epochs=3", f"output_dir={trained / 'lora'}"])
    with pytest.raises(UserError, match="the base alone has no classification head"):
        evaluate.main(["--config", str(path), "--checkpoint", "base"])
    with pytest.raises(UserError, match="task 'cls' needs key 'num_labels'"):
        load_config(path, ["num_labels="])
    with pytest.raises(UserError, match="'num_labels' is 1 but must be at least 2"):
        load_config(path, ["num_labels=1"])


def test_an_unknown_template_is_named_with_those_of_the_task(documents, tiny_models, tmp_path):
    with pytest.raises(UserError, match="'ultra_condensed'; use one of plain, paper_decision for task 'cls'"):
        encoder_of(documents, tiny_models["qwen2"], tmp_path, template="ultra_condensed")


def test_the_preflight_shows_the_prompt_and_counts_the_head(documents, tiny_models, tmp_path, capsys):
    path = document_config(documents, tiny_models["qwen2"], tmp_path / "out")
    train.main(["--config", str(path), "--check"])
    shown = capsys.readouterr().out
    assert "Classify this document." in shown and "Check passed" in shown
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("  head")] == [
        ["head", "130", "parameters"]
    ]


# --------------------------------------------------------------------------------------------------- the experiments


def test_the_six_configs_differ_in_rates_and_in_what_is_shown_alone():
    configs = {}
    for kind in ("text", "vision"):
        for name, rates in (("2e5", (2e-5, None)), ("2e6", (2e-6, None)), ("2e5_backbone_2e6", (2e-5, 2e-6))):
            stem = f"lr_{kind}_{name}"
            config = load_config(REPO / "configs" / f"{stem}.yaml")
            assert (config.learning_rate, config.backbone_learning_rate) == rates
            assert (config.train_bs, config.grad_accum) == {"text": (2, 4), "vision": (4, 2)}[kind]
            assert config.output_dir == f"saves/lr_experiment_v7/{stem}"
            assert config.results_dir == f"results/lr_experiment_v7/{stem}"
            own = {"experiment", "output_dir", "results_dir", "learning_rate", "backbone_learning_rate"}
            same = {key: value for key, value in vars(config).items() if key not in own}
            assert configs.setdefault(kind, same) == same
    shared = {key for key in configs["text"] if configs["text"][key] == configs["vision"][key]}
    assert configs["text"].keys() - shared == {
        "model_name", "data", "resize", "max_pixels", "max_tokens", "train_bs", "grad_accum", "eval_bs"
    }  # fmt: skip
    one = configs["text"]
    assert (one["task"], one["finetuning"], one["parallel"], one["num_train_epochs"]) == ("cls", "full", "fsdp", 6)
    assert (one["warmup_steps"], one["save_steps"], one["save_total_limit"]) == (5, "epoch", 3)


@pytest.mark.slow
def test_two_ranks_predict_what_one_does(trained):
    config = trained / "full.yaml"
    evaluate.main(["--config", str(config), "eval_bs=5"])
    alone = predictions(trained / "full_results")
    code, text = finish(start(config, "eval_bs=5", ranks=2, script="evaluate.py"))
    assert code == 0, text
    assert predictions(trained / "full_results") == alone


def test_the_final_model_answers_in_predict(trained, capsys):
    import predict

    predict.main(["--adapter-path", str(trained / "full"), "--prompt", "paper accept"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] in ("Label: 0", "Label: 1") and lines[1].startswith("Probabilities: 0: ")
    model = load_trained(load_config(trained / "full.yaml"), trained / "full", torch.device("cpu"))
    assert hasattr(base_of(model), "cls_head")
