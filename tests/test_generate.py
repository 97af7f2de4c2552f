"""Greedy answers are those of transformers' generate, however the prompts are batched."""

import contextlib

import pytest
import torch
from support.tiny_runs import END, FAMILIES, build_items, calls_to, short_answers, tiny_run, vqa_samples
from transformers import AutoImageProcessor
from transformers.cache_utils import DynamicLayer

import attention
import inference
import model
from batches import collate
from dataset import EvalDataset
from distributed import Ranks
from images import letterbox, open_image
from inference import RoomyLayer, answer_split, greedy
from samples import SampleList
from templates import CHAT_OPTIONS, split_answer, to_messages

NEW_TOKENS = 8
ONE_BY_ONE: dict[str, dict] = {}  # family -> the answers of batches of one


@pytest.fixture(params=FAMILIES)
def run(request, tiny_models):
    return tiny_run(tiny_models, request.param)


def prompts() -> list[dict]:
    """Groups of four and of two, images one by one and two by two, and a question without any."""
    several = [{**sample, "id": "s" + sample["id"]} for sample in vqa_samples(3, 2, images_each=2)][:4]
    return [*vqa_samples(images=2, questions=4), *several, {"id": "text", "question": "How many?", "answer": "3"}]


def end_ids(run) -> set[int]:
    return {run.tokenizer.convert_tokens_to_ids(token) for token in (END, "<|endoftext|>")}


def answers(run, samples, batch_size: int, share_prefix: bool, **options) -> dict[str, tuple[list[int], bool]]:
    """Sample id -> (token ids, finished)"""
    dataset = EvalDataset(SampleList(samples, "s"), run.encoder(), share_prefix, batch_size, True)
    model, limit = options.get("model", run.model()), options.get("max_new_tokens", NEW_TOKENS)
    found = {}
    for index in range(len(dataset)):
        batch = dataset[index]
        tokens = greedy(model, batch, run.family, end_ids(run), limit)
        found |= dict(zip(batch["sample_ids"], tokens, strict=True))
    return found


def answers_one_by_one(run) -> dict[str, tuple[list[int], bool]]:
    if run.name not in ONE_BY_ONE:
        ONE_BY_ONE[run.name] = answers(run, prompts(), batch_size=1, share_prefix=False)
    return ONE_BY_ONE[run.name]


def by_transformers(run, sample) -> list[int]:
    """What generate() answers to the family's own prompt, up to the end token."""
    processor = AutoImageProcessor.from_pretrained(run.model_folder, backend="pil")
    messages, _ = split_answer(to_messages(sample, run.config.template))
    text = run.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **CHAT_OPTIONS)
    paths = run.encoder().images_of(sample)
    images = [letterbox(open_image(run.folder / path), run.config.image_size)[0] for path in paths]
    inputs = dict(processor(images=images, return_tensors="pt")) if images else {}
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 16)
    ids = run.tokenizer(text, return_tensors="pt")["input_ids"]
    output = (
        run.model()
        .generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == run.family.image_token_id).int(),
            **inputs,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=sorted(end_ids(run)),
        )[0, ids.shape[1] :]
        .tolist()
    )
    end = next((place for place, token in enumerate(output) if token in end_ids(run)), len(output))
    return output[:end]


def test_answers_equal_those_of_generate_one_by_one(run):
    expected = {sample["id"]: by_transformers(run, sample) for sample in prompts()}
    assert len({tuple(answer) for answer in expected.values()}) > 3, "prompts that are all answered alike prove little"
    ours = answers(run, prompts(), batch_size=16, share_prefix=True)
    assert {id: tokens for id, (tokens, _) in ours.items()} == expected


@pytest.mark.parametrize(("batch_size", "share_prefix"), [(16, True), (5, True), (3, False)])
def test_answers_do_not_depend_on_the_batch_or_on_sharing(run, batch_size, share_prefix):
    assert answers(run, prompts(), batch_size, share_prefix) == answers_one_by_one(run)


def test_answers_are_the_same_with_the_heads_laid_out_as_on_a_gpu(run, monkeypatch):
    """There the query heads that read the same keys stand together, and so must the masks of several questions."""
    for room in (attention, model):
        monkeypatch.setattr(room, "heads_together", lambda device, heads, key_heads: heads // key_heads)
    text_config = run.model().config.get_text_config()
    assert text_config.num_attention_heads > text_config.num_key_value_heads
    assert answers(run, prompts(), 16, True) == answers_one_by_one(run)


class Scripted(torch.nn.Module):
    """Stands in for a model that answers question i with i + 1 words and then ends; the words are its own number."""

    def __init__(self, run, end_id: int):
        super().__init__()
        self.config, self.end_id, self.asked = run.model().config, end_id, []

    def first_logits(self, model, batch, family, places, past_key_values, **others):
        """In place of `forward_logits`."""
        self.step = 0
        for number, layer in enumerate(past_key_values.layers):
            if hasattr(layer, "update"):  # of keys; recurrent layers have states
                past_key_values.update(*torch.zeros(2, len(batch["slots"]), 1, 1, 1), number)
        return torch.nn.functional.one_hot(torch.arange(len(places)) + 10, 2000).float()

    def forward(self, input_ids, **others):
        self.step += 1
        self.asked.append(input_ids.numel())
        tokens = torch.where(input_ids < 10 + self.step, self.end_id, input_ids)
        return type("Output", (), {"logits": torch.nn.functional.one_hot(tokens, 2000).float()})()


def scripted(run, monkeypatch, max_new_tokens: int) -> tuple[list, list[int]]:
    """(answers, tokens of each forward pass after the first)"""
    monkeypatch.setattr(inference, "adapter_in_the_bases_type", lambda model: contextlib.nullcontext())  # there is none
    items, images = build_items(run.encoder(), vqa_samples(images=1, questions=4), generation=True)
    batch = collate(items, images, True, 0)
    end = run.tokenizer.convert_tokens_to_ids(END)
    model = Scripted(run, end)
    monkeypatch.setattr(inference, "forward_logits", model.first_logits)
    return greedy(model, batch, run.family, end_ids(run), max_new_tokens), model.asked


def test_answers_end_at_their_own_end_token_while_neighbours_go_on(run, monkeypatch):
    found, asked = scripted(run, monkeypatch, 99)
    assert found == [([10], True), ([11] * 2, True), ([12] * 3, True), ([13] * 4, True)]
    assert asked == [4, 4, 2, 1], "those that have ended leave, and nothing is computed once all have"


def test_an_answer_cut_off_at_the_limit_is_marked_as_unfinished(run, monkeypatch):
    found, _ = scripted(run, monkeypatch, 3)
    assert found == [([10], True), ([11] * 2, True), ([12] * 3, False), ([13] * 3, False)]


def test_an_image_is_read_once_for_all_its_questions(run):
    base = run.model().get_base_model()
    with calls_to(base.model.visual.patch_embed) as seen, calls_to(base.model.language_model) as read:
        answers(run, vqa_samples(images=1, questions=4), 16, True)
    assert len(seen) == 1
    lengths = [kwargs["inputs_embeds"].shape[1] for _, kwargs, _ in read]
    assert lengths[0] > 100 and set(lengths[1:]) == {4}, "then one token for each question at a time"


def test_no_more_steps_are_taken_than_the_longest_answer_needs(run):
    with calls_to(run.model().get_base_model().lm_head) as calls:
        answers(run, vqa_samples(1, 2), 2, True, max_new_tokens=3)
    assert len(calls) == 3


def test_the_roomy_cache_holds_what_transformers_own_does_and_seldom_copies_it():
    ours, theirs = RoomyLayer(), DynamicLayer()
    buffers, generator = set(), torch.Generator().manual_seed(0)
    for step, tokens in enumerate([40, *[3] * 60]):
        new = torch.randn(2, 6 if step < 30 else 2, 2, tokens, 4, generator=generator)  # keys and values
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        if step == 29:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([4, 1]))
        buffers.add(ours.buffers[0].data_ptr())
    assert ours.get_seq_length() == theirs.get_seq_length() == 220
    assert len(buffers) <= 10, "220 tokens, a quarter of room each time"


def test_answers_are_written_into_the_cache_without_copying_it(run):
    used = []

    def note(module, args, kwargs):
        keys = [layer.keys for layer in kwargs["past_key_values"].layers if getattr(layer, "keys", None) is not None]
        used.append([states.data_ptr() for states in keys])

    handle = run.model().get_base_model().model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        answers(run, vqa_samples(1, 2), 2, True, max_new_tokens=5)
    finally:
        handle.remove()
    first, *steps = used  # the prefix is read into an empty cache
    assert first == [] and steps[0] and all(step == steps[0] for step in steps)


def test_float32_adapters_are_cast_once_for_all_answers_of_a_batch_and_then_are_as_before(tiny_models, monkeypatch):
    run, rank = tiny_run(tiny_models, "qwen3_vl"), Ranks(0, 1, torch.device("cpu"))
    model = run.fresh_model(torch.bfloat16).eval()
    adapter = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    for parameter in adapter:
        parameter.data = parameter.data.float() * 1.01  # what bfloat16 cannot hold
    before, asked = [(parameter.data_ptr(), parameter.dtype) for parameter in adapter], []
    samples = vqa_samples(1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(inference, "adapter_in_the_bases_type", lambda model: contextlib.nullcontext())
        cast_by_every_layer = answers(run, samples, 2, True, model=model)
    note = model.register_forward_pre_hook(lambda *_: asked.append({parameter.dtype for parameter in adapter}))
    with short_answers(NEW_TOKENS), note:
        rows = answer_split(model, SampleList(samples, "s"), run.encoder(), rank)
    assert asked and all(types == {torch.bfloat16} for types in asked)
    assert [(parameter.data_ptr(), parameter.dtype) for parameter in adapter] == before
    expected = [run.tokenizer.decode(tokens).strip() for tokens, _ in cast_by_every_layer.values()]
    assert [row["prediction"] for row in rows] == expected
