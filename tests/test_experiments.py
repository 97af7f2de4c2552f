"""What the shipped experiments promise: the order trained, the curriculum's starting points, sequential reasoning that
never sees gold answers, and QLoRA on 4-bit weights that do not change."""

import itertools
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from support.run_helpers import REPO, finish, log_rows, order, start_train, write_config, write_samples

import inference
import train
from checkpoint import load_trained
from config import flatten, load_config, to_dict
from dataset import SampleEncoder
from distributed import Ranks
from family import load_family
from model import load_tokenizer
from samples import SampleList, load_split
from templates import as_conversations, to_messages

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    samples = sorted(write_samples(folder), key=lambda sample: sample["stage"])
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def stages_trained(output, data):
    stage_of = {sample["id"]: sample["stage"] for sample in json.loads((data / "samples.json").read_text())}
    return [[stage_of[sample_id] for sample_id in ids] for _, ids in order(output)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_question_cost_and_result_and_is_valid(path):
    head = path.read_text().splitlines()[:8]
    for word in ("# Question: ", "# Cost: ", "# Result: ", "# Run: "):
        assert any(line.startswith(word) for line in head), f"{path.name} lacks {word!r}"
    load_config(path)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("exp2_random_order", {"order": "random"}),
        ("exp2_standard_prompt", {"template": "standard"}),
        ("exp2_qwen2_vl", {"model_name": "Qwen/Qwen2-VL-7B-Instruct", "image_size": 756}),
    ],
)
def test_each_of_exp2s_kin_differs_from_it_in_one_thing_alone(name, changed):
    first, second = (flatten(to_dict(load_config(REPO / "configs" / f"{one}.yaml"))) for one in ("exp2", name))
    differing = {key: second[key] for key in first | second if first.get(key) != second.get(key)}
    folders = {"output_dir": f"outputs/{name}", "results_dir": f"results/{name}"}
    assert differing == {"experiment": second["experiment"], **folders, **changed}
    jobs = [(REPO / "slurm" / f"train_{one}_2gpu.slurm").read_text().splitlines()[4:] for one in ("exp2", name)]
    assert [line.replace(f"exp2{name[4:]}", "exp2") for line in jobs[1]] == jobs[0]


@pytest.mark.parametrize("job", sorted((REPO / "slurm").glob("train_*.slurm")), ids=lambda job: job.stem)
def test_a_job_asks_for_a_cpu_per_worker_and_its_config_says_the_batch_of_the_jobs_gpus(job):
    text = job.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    gpus, cpus = int(asked["gres"].removeprefix("gpu:")), int(asked["cpus-per-task"])
    names = re.findall(r"^train_and_evaluate (\S+)", text, re.M)
    for name in names:
        config = load_config(REPO / name)
        assert gpus * (1 + config.dataloader_num_workers) <= cpus
        product = f"# {config.train_bs} × {config.grad_accum} × {gpus} GPU{'s' * (gpus > 1)} = "
        assert product + str(config.train_bs * config.grad_accum * gpus) in (REPO / name).read_text()
    if not names:  # chains, a GPU and an equal share of the CPUs each
        (workers,) = re.findall(r"dataloader_num_workers=(\d+)", text)
        assert gpus * (1 + int(workers)) <= cpus and gpus == text.count("\nchain ")


def test_exp2_trains_stages_in_order_over_all_ranks_in_every_epoch_and_exp1_does_not(data, tiny_models, tmp_path):
    orders = {name: load_config(REPO / "configs" / f"{name}.yaml").order for name in ("exp1", "exp2")}
    assert orders == {"exp1": "random", "exp2": "sequential"}
    keys = {"num_train_epochs": 2, "train_bs": 2, "grad_accum": 1}
    config = write_config(data, tiny_models["qwen3_vl"], tmp_path / "exp2", order=orders["exp2"], **keys)
    code, text = finish(start_train(config, ranks=2))
    assert code == 0, text
    steps = stages_trained(tmp_path / "exp2", data)
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        stages = list(itertools.chain.from_iterable(epoch))
        assert len(stages) == 15 and stages == sorted(stages)


def test_a_curriculum_stage_starts_at_exactly_the_adapter_before_and_exp3_does_not(data, tiny_models, tmp_path):
    for stage in (2, 3):
        before = load_config(REPO / "configs" / f"exp4_stage{stage}.yaml").init_adapter
        assert before == load_config(REPO / "configs" / f"exp4_stage{stage - 1}.yaml").output_dir
        assert load_config(REPO / "configs" / f"exp3_stage{stage}.yaml").init_adapter is None
    first = tmp_path / "stage1"
    train.main(["--config", str(write_config(data, tiny_models["qwen3_vl"], first, num_train_epochs=1))])
    start_of = {}
    for name, adapter in (("exp4", str(first)), ("exp3", None)):
        # A rate of 0 leaves the weights where they start.
        keys = {"learning_rate": 0, "num_train_epochs": 1, "init_adapter": adapter}
        train.main(["--config", str(write_config(data, tiny_models["qwen3_vl"], tmp_path / name, **keys))])
        start_of[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    final = load_file(first / "adapter_model.safetensors")
    assert all(torch.equal(final[name], start_of["exp4"][name]) for name in final)
    assert not all(torch.equal(final[name], start_of["exp3"][name]) for name in final)


# ------------------------------------------------------------------------------------------- sequential reasoning


@pytest.fixture
def sequential(data, tiny_models, tmp_path):
    config = write_config(data, tiny_models["qwen3_vl"], tmp_path / "exp5", template="sequential_cot", max_tokens=2000)
    config = load_config(config)
    family = load_family(config.model_name)
    return config, SampleEncoder(config, family, load_tokenizer(config.model_name))


def test_a_conversation_goes_through_an_images_questions_in_stage_order_with_all_answers_supervised(sequential):
    config, encoder = sequential
    conversations = load_split(config, "train")
    assert len(conversations) == 3
    for conversation in conversations:
        stages = [turn["stage"] for turn in conversation["turns"]]
        assert len(stages) == 5 and stages == sorted(stages)
        item = encoder.encode(conversation, [encoder.load_image(path) for path in encoder.images_of(conversation)])
        supervised = encoder.tokenizer.decode(item.labels[item.labels >= 0])
        assert supervised == "".join(turn["answer"] + "<|im_end|>" for turn in conversation["turns"])


def test_gold_answers_cannot_reach_a_prompt_and_the_models_own_do(sequential, monkeypatch):
    config, encoder = sequential
    gold = list(load_split(config, "train"))
    for conversation in gold:
        for turn in conversation["turns"]:
            turn["answer"] = "GOLD-SECRET"
    seen = []
    encode = SampleEncoder.encode

    def spy(self, sample, images, generation=False):
        item = encode(self, sample, images, generation)
        seen.append(self.tokenizer.decode(item.input_ids))
        return item

    def fixed_answers(model, batch, family, end_ids):
        return [(encoder.tokenizer("OWN-ANSWER")["input_ids"], True) for _ in batch["sample_ids"]]

    monkeypatch.setattr(SampleEncoder, "encode", spy)
    monkeypatch.setattr(inference, "greedy", fixed_answers)
    ranks = Ranks(0, 1, torch.device("cpu"))
    lines = inference.answer_split(None, SampleList(gold, "gold"), encoder, ranks)
    assert len(lines) == 15 and {line["prediction"] for line in lines} == {"OWN-ANSWER"}
    assert len(seen) == 15 and not any("GOLD-SECRET" in prompt for prompt in seen)
    assert sorted(prompt.count("OWN-ANSWER") for prompt in seen) == sorted([0, 1, 2, 3, 4] * 3)


def test_own_answers_that_spell_a_control_token_stay_text():
    (conversation,) = as_conversations([dict(id=str(n), question="q?", answer="a", stage=1) for n in (1, 1)])
    shortened = inference.own_answers_only({**conversation, "turns": conversation["turns"] * 2}, ["<|im_end|>"])
    assert "<|" not in str(to_messages(shortened, "sequential_cot"))


# ----------------------------------------------------------------------------------------------------------- QLoRA


def test_qlora_learns_on_4_bit_weights_that_do_not_change_and_resumes_exactly(data, tiny_models, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (requirements-extra.txt)")
    keys = {"quantization": "nf4", "num_train_epochs": 4, "learning_rate": 3e-3, "save_steps": 5}
    captured = []
    prepare = train.modeling.prepare_training

    def capture(base, config):
        packed = {name: p.detach().clone() for name, p in base.named_parameters() if p.dtype == torch.uint8}
        model = prepare(base, config)
        captured.append((model, packed))
        return model

    monkeypatch.setattr(train.modeling, "prepare_training", capture)
    whole = tmp_path / "whole"
    train.main(["--config", str(write_config(data, tiny_models["qwen3_vl"], whole, **keys))])
    losses = [row["loss"] for row in log_rows(whole)]
    assert losses[-1] < losses[0] - 0.3
    model, packed = captured[0]
    assert packed and len(packed) % 7 == 0  # seven linear layers a decoder layer
    after = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(before, after[name]) for name, before in packed.items())
    assert not any("visual" in name or "lm_head" in name for name in packed)
    layers = [
        module for module in model.modules() if type(module).__name__ == "Linear4bit" and hasattr(module, "lora_A")
    ]
    assert len(layers) == len(packed) and all("forward" in vars(layer) for layer in layers)
    hidden = torch.randn(2, 5, layers[0].in_features)
    with torch.no_grad():
        own, pefts = layers[0].eval()(hidden), type(layers[0]).forward(layers[0], hidden)
        assert not torch.allclose(own, layers[0].base_layer(hidden), atol=1e-5), "the adapter adds something"
    assert torch.allclose(own, pefts, atol=1e-5)

    record = train.RunLog.record

    def crash_at_8(self, values, prefix):
        record(self, values, prefix)
        if values["step"] == 8:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    config = write_config(data, tiny_models["qwen3_vl"], cut, **keys)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.RunLog, "record", crash_at_8)
        train.main(["--config", str(config)])
    train.main(["--config", str(config)])
    assert [row["loss"] for row in log_rows(cut)] == losses
    # The adapter also fits the full-precision base, where merge.py puts it.
    full_precision = load_config(config, ["quantization=none"])
    merged = load_trained(full_precision, cut, torch.device("cpu")).merge_and_unload()
    assert not any(p.dtype == torch.uint8 for p in merged.parameters())
