"""What a run will need is counted without weights, and a run needs what was counted."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from support.document_runs import document_config, write_documents
from support.tiny_runs import FAMILIES, build_items, tiny_run, vqa_samples
from torch.utils.flop_counter import FlopCounterMode

import forecast
from batches import collate
from classification import attach_head, make_loss
from config import load_config
from dataset import SampleEncoder
from distributed import Ranks
from family import load_family
from forecast import Operations, PassMemory, count_step, evaluation_share, held_bytes, meta_loss, pass_bytes
from model import all_text_layers, load_base, load_tokenizer, optimizer_groups, prepare_training, trainable_parameters
from preflight import make_plan
from samples import SampleList, load_samples
from templates import as_conversations

CPU = torch.float32  # what a run computes in there
VARIANTS = {
    "lora": {},
    "lora, checkpointed": {"gradient_checkpointing": True},
    "lora, vision too": {"vision_frozen": False, "projector_frozen": False},
    "full, vision too": {"finetuning": "full", "vision_frozen": False, "projector_frozen": False},
}


def real_loss(config, family):
    base = load_base(config.model_name, CPU)
    if config.task == "cls":
        attach_head(base, config.num_labels, config.seed)
    return make_loss(prepare_training(base, config), family, config).train()


def batch_of(encoder, samples, share_prefix=True) -> dict:
    items, images = build_items(encoder, samples)
    return collate(items, images, share_prefix, encoder.tokenizer.pad_token_id)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_for_real(loss, config, batch) -> tuple[int, int]:
    """(bytes of weights, gradients and the optimizer after a step, most bytes alive in a pass beside them)."""
    peak = pass_bytes(loss, batch)
    optimizer = torch.optim.AdamW(optimizer_groups(loss.model, config))
    loss(batch).backward()
    trained = trainable_parameters(loss.model).values()
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return bytes_of([*loss.parameters(), *(p.grad for p in trained if p.grad is not None), *moments]), peak


def assert_counted(config, family, batch) -> None:
    counted = meta_loss(config, family, CPU)
    states, peak = held_for_real(real_loss(config, family), config, batch)
    assert sum(held_bytes(counted, config, 1, CPU).values()) == pytest.approx(states, rel=0.15)
    assert pass_bytes(counted, batch) == pytest.approx(peak, rel=0.15)


def memory_cases():
    """Every variant of every family; of Qwen3.5, whose recurrent layers take long to follow, one in the quick tests."""
    for name in FAMILIES:
        for variant in VARIANTS:
            slow = name == "qwen3_5" and variant != "lora, checkpointed"
            yield pytest.param(name, variant, marks=[pytest.mark.slow] * slow, id=f"{name}-{variant}")


@pytest.mark.parametrize(("name", "variant"), memory_cases())
def test_the_memory_counted_without_weights_is_what_a_run_holds_within_15_percent(tiny_models, name, variant):
    run = tiny_run(tiny_models, name)
    encoder = run.encoder(**VARIANTS[variant])
    assert_counted(encoder.config, run.family, batch_of(encoder, vqa_samples(3, 4)))


def test_the_memory_of_classifying_texts_is_counted_within_15_percent(tiny_models, tmp_path):
    documents = write_documents(tmp_path, 8, 2, 2)
    config = load_config(document_config(documents, tiny_models["qwen2"], tmp_path / "out"))
    family = load_family(config.model_name)
    encoder = SampleEncoder(config, family, load_tokenizer(config.model_name))
    assert_counted(config, family, batch_of(encoder, list(load_samples(config.data.train))))


def test_four_bits_and_shards_hold_as_much_less_as_their_makers_say(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    loss = meta_loss(run.config, run.family, torch.bfloat16)
    held = held_bytes(loss, run.config, 1, torch.bfloat16)
    four_bits = held_bytes(loss, replace(run.config, quantization="nf4"), 1, torch.bfloat16)
    layers = loss.model.get_base_model().model.language_model.layers
    weights = sum(p.numel() for name, p in layers.named_parameters() if name.endswith("base_layer.weight"))
    # 4.127 bits a parameter with double quantisation (QLoRA, arXiv 2305.14314, section 3)
    assert held["frozen"] - four_bits["frozen"] == pytest.approx(weights * (16 - 4.127) / 8, rel=1e-3)
    full = replace(run.config, finetuning="full", parallel="fsdp")
    loss = meta_loss(full, run.family, torch.bfloat16)
    one, four = (held_bytes(loss, full, ranks, torch.bfloat16) for ranks in (1, 4))
    assert [one[part] / four[part] for part in ("frozen", "trained", "copies")] == [4, 4, 1]


def test_more_rows_in_a_pass_are_counted_along_a_line_and_the_largest_that_fits_is_found(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    encoder, sample = run.encoder(), vqa_samples(1, 1)[0]
    memory = PassMemory(meta_loss(run.config, run.family, torch.bfloat16), sample, encoder)
    three = forecast.largest_passes(sample, encoder, 3 * memory.row)[0]
    counted = pass_bytes(meta_loss(run.config, run.family, torch.bfloat16), three)
    assert memory.bytes(3 * memory.row) == pytest.approx(counted, rel=0.02)
    for tokens in (512, 1024):
        assert memory.fitting(memory.bytes(tokens) + 1) == tokens
    assert (memory.fitting(0), memory.fitting(1e18)) == (memory.row, memory.full)


def test_trial_passes_of_recurrent_layers_hold_as_many_states_as_real_ones(tiny_models, monkeypatch):
    run, (sample,) = tiny_run(tiny_models, "qwen3_5"), vqa_samples(1, 1)
    plain, forked, one = forecast.largest_passes(sample, run.encoder(), 500, questions=4)
    assert forked["slots"].shape[1] == 4 and forked["shared_prefix"] and forked["input_ids"].numel() <= 500
    assert len(forked["row_lengths"]) == len(forked["image_grid_thw"]) > 1, "each row with an image of its own"
    assert plain["shared_prefix"] is None and one["input_ids"].shape[0] == 1
    assert len(forecast.largest_passes(sample, run.encoder(share_prefix=False), 500, questions=4)) == 2
    assert len(forecast.largest_passes(sample, tiny_run(tiny_models, "qwen3_vl").encoder(), 500, questions=4)) == 2
    samples = SampleList([*vqa_samples(2, 3), *vqa_samples(1, 4)[3:]], "s")
    assert forecast.most_questions(samples, run.family) == 4
    assert forecast.most_questions(None, tiny_run(tiny_models, "qwen3_vl").family) == 1, "nothing is searched"

    monkeypatch.setattr(forecast, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(forecast, "_fits", lambda loss, batch, *others: len(batch["sample_ids"]) <= 2)
    samples, ranks = SampleList(vqa_samples(1, 9), "s"), Ranks(0, 1, torch.device("cpu"))
    searched = Mock(wraps=forecast.most_questions)
    monkeypatch.setattr(forecast, "most_questions", searched)
    found, told = forecast.try_largest_passes(torch.nn.Linear(1, 1), samples, 0, run.encoder(), 256, 0, ranks, None)
    assert found < 256 and "going on with pass_tokens=" in told[-1], "one row of too many questions is cut"
    assert searched.call_count == 1, "once, however often the passes are halved"

    paths = []
    monkeypatch.setattr(
        forecast, "pass_bytes", lambda _, batch: paths.append(batch["shared_prefix"] is None) or 9 * len(paths)
    )
    for questions in (1, 4):  # the first is of the row alone; the slope, of the others
        paths.clear()
        PassMemory(None, sample, run.encoder(), questions)
        assert len(set(paths[-2:])) == 1, questions


def test_the_row_alone_is_the_last_trial_pass_and_the_least_that_a_run_needs(tiny_models, monkeypatch):
    """Where the budget holds one row, one with some questions more, and two."""
    run, (sample,) = tiny_run(tiny_models, "qwen3_5"), vqa_samples(1, 1)
    tokens = forecast.largest_passes(sample, run.encoder(), 1)[-1]["input_ids"].numel()
    monkeypatch.setattr(forecast, "pass_bytes", lambda _, batch: batch["input_ids"].numel())
    for budget, passes in ((tokens, 1), (2 * tokens - 1, 2), (2 * tokens, 3)):
        monkeypatch.setattr(forecast, "FULL_PASS", budget)
        tried = forecast.largest_passes(sample, run.encoder(), budget, questions=4)
        assert len(tried) == passes and tried[-1]["input_ids"].numel() == tokens
        memory = PassMemory(None, sample, run.encoder(), questions=4)
        assert (memory.row, memory.first) == (tokens, tokens)


# --------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("variant", ["lora", "lora, checkpointed", "full, vision too"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_operations_by_formula_are_those_of_the_matrix_products_that_a_step_runs(tiny_models, name, variant):
    run = tiny_run(tiny_models, name, layers=4)  # of which DeepStack reaches two
    encoder = run.encoder(**VARIANTS[variant])
    loss = real_loss(encoder.config, run.family)
    items, images = build_items(encoder, vqa_samples(3, 1))
    batch = collate(items, images, True, run.tokenizer.pad_token_id)
    attentions = [layer.self_attn for layer in all_text_layers(loss.model) if hasattr(layer, "self_attn")]
    ran = []
    for attention in attentions:
        attention.register_forward_pre_hook(lambda *_: ran.append(1))
    with FlopCounterMode(display=False) as counter:
        loss(batch).backward()
    operations = Operations.of(loss.model, recomputed=encoder.config.gradient_checkpointing)
    forward = Operations.of(loss.model, training=False).per_pair / len(attentions)
    assert operations.per_pair == forward * (len(ran) + 2 * len(attentions)), "a backward is two forwards"
    matrices = replace(operations, per_pair=0, per_patch_pair=0)  # it does not count a CPU's attention
    shown = [int((items[0].input_ids == run.family.image_token_id).sum())] * 3
    rows = [[len(item.input_ids)] for item in items]
    # Neither does it know that Qwen3.5's convolution has a channel to a group.
    left_out = ("attention", "convolution")
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(n for name, n in counts if not any(part in str(name) for part in left_out))
    tolerance = 0.15 if run.family.is_recurrent else 0.07  # its rule fills up chunks of 64 tokens, and is large here
    assert matrices.useful(rows, batch["answer_tokens"], shown) == pytest.approx(counted, rel=tolerance)


# ---------------------------------------------------------------------------------------------------------- the lines


def test_a_step_counts_each_question_once_and_a_shared_prefix_once(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    items, _ = build_items(run.encoder(), vqa_samples(3, 4))
    shared, alone = (count_step(items, share, 10_000, 1) for share in (True, False))
    assert (shared["questions"], shared["rows"], alone["rows"]) == (12, 3, 12)
    assert shared["tokens_alone"] == alone["tokens_alone"] == alone["tokens"] == sum(len(i.input_ids) for i in items)
    assert shared["tokens"] < alone["tokens"] / 2 and shared["padded"] >= shared["tokens"] == shared["slowest"]
    two = count_step(items, True, 10_000, 2)
    assert two["tokens"] == shared["tokens"] and two["slowest"] < shared["slowest"]


def test_the_share_of_the_evaluations_is_their_tokens_over_those_of_the_run(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList(vqa_samples(3, 4), "s")
    config = replace(run.config, order="sequential", train_bs=4, grad_accum=1, num_train_epochs=2, eval_steps=2)
    encoder = run.encoder()
    plan = make_plan(config, samples, encoder, 1)
    splits = {"train": samples, "val": samples}

    def share(**changes):
        changed = replace(config, **changes)
        counts = forecast.count_run(changed, plan, samples, encoder, 10_000, 1)
        return evaluation_share(changed, plan, splits, encoder, counts)

    # Six steps: two evaluations of an image's four questions and one of all, for the loss and for the answers.
    questions = 2 * (2 * 4 + 12) / 2  # a forward pass alone is half of what a frozen model's training token costs
    found, line = share(eval_max_samples=7)
    assert found == pytest.approx(questions / (questions + 24))
    assert line == f"Evaluation: 2 times 4 and all 12 of val's questions at the end: {found:.1%} of the run's work, " \
        "counted in tokens laid out"  # fmt: skip
    assert share(eval_max_samples=0)[0] == pytest.approx(18 / (18 + 24)), "the loss alone, each time of all"
    assert share(eval_max_samples=7, finetuning="full")[0] == pytest.approx((40 / 3) / (40 / 3 + 24))
    splits["val"] = SampleList(as_conversations(vqa_samples(3, 4)), "s")
    loss, both = (share(eval_steps=6, eval_max_samples=most)[0] for most in (0, 7))
    assert both / (1 - both) == pytest.approx((1 + 4) * loss / (1 - loss)), "four answers a conversation, one loss"


def test_check_says_what_the_run_needs_and_which_card_holds_it(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    config = replace(run.config, eval_steps=1, num_train_epochs=3)
    samples = SampleList(vqa_samples(3, 4), "s")
    encoder, splits = run.encoder(), {"train": samples, "val": samples}
    plan = make_plan(config, samples, encoder, 2)
    lines = forecast.forecast(config, splits, 0, encoder, plan, 2, 400)
    said = "\n".join(lines)
    assert said.startswith("Forecast for each of 2 GPUs, counted from shapes; nothing was measured:")
    for part in ("a card of 48 GB: fits", "a card of 80 GB: fits", "TFLOP", "questions per prefix", "Evaluation: ",
                 "if each GPU reaches 400 TFLOP/s (a stated rate: --tflops)"):  # fmt: skip
        assert part in said
    sharded = replace(config, parallel="fsdp", finetuning="full")
    for steps, said in ((1, True), (None, False)):
        lines = forecast.forecast(replace(sharded, eval_steps=steps), splits, 0, encoder, plan, 2, 400)
        assert any("the whole model, instead of a pass, while it is evaluated" in line for line in lines) == said
    crowded = replace(config, pass_tokens=10**9)
    assert "a card of 80 GB: does not fit" in "\n".join(forecast.forecast(crowded, splits, 0, encoder, plan, 2, 400))
