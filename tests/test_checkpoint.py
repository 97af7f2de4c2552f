"""Trained weights: loaded exactly or refused by name, onto the base they belong to; saved whole or not at all."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.run_helpers import write_config, write_samples

import checkpoint
import evaluate
import family
import merge
import predict
import run_folder
import train
from checkpoint import load_trained, whats_wrong
from config import load_config
from errors import UserError

CPU = torch.device("cpu")
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "trained_weights.safetensors"}


@pytest.fixture(scope="module")
def runs(tiny_models, tmp_path_factory):
    """name -> the config path of a run of two steps with a checkpoint after each: lora, full, fsdp. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    write_samples(folder, images=1, questions=4)
    made = {}
    for name, changes in {"lora": {}, "full": {"finetuning": "full"},
                          "fsdp": {"finetuning": "full", "parallel": "fsdp"}}.items():  # fmt: skip
        keys = {"save_steps": 1, "num_train_epochs": 2, "warmup_steps": 0, **changes}
        made[name] = write_config(folder, tiny_models["qwen3_vl"], folder / name, **keys)
        train.main(["--config", str(made[name])])
    return made


@pytest.fixture
def copied(runs, tmp_path):
    """copied(name) -> a copy of the run's checkpoint-2 that a test may spoil; final: of its result."""

    def copied(name, final=False):
        source = Path(load_config(runs[name]).output_dir)
        return shutil.copytree(source if final else source / "checkpoint-2", tmp_path / name,
                               ignore=shutil.ignore_patterns("checkpoint-*", ".lock", "runs"))  # fmt: skip

    return copied


def every_loader(config, folder):
    """evaluate.py, predict.py and merge.py, each to be called without an argument."""
    image = str(Path(load_config(config).data.image_root) / "0.png")
    asked = ["--adapter-path", str(folder), "--image", image, "--prompt", "?", "--candidates", "red; none"]
    merged = ["--adapter-path", str(folder), "--out", f"{folder}-merged", "--config", str(config)]
    return {
        "evaluate": lambda: evaluate.main(["--config", str(config), "--checkpoint", str(folder)]),
        "predict": lambda: predict.main([*asked, "--config", str(config)]),
        "merge": lambda: merge.main(merged),
    }


def change(path, edit):
    """Rewrite a safetensors file, its metadata included, after edit(tensors) has changed it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    tensors = load_file(path)
    edit(tensors)
    if "DCP_SHARDING_INFO" in metadata:
        offsets = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()}
        metadata["DCP_SHARDING_INFO"] = json.dumps(offsets)
    save_file(tensors, path, metadata=metadata)


# ------------------------------------------------------------------------------------------------------ exactly or not


def rename_one(tensors):
    name = sorted(tensors)[0]
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def remove_six(tensors):
    for name in sorted(tensors)[:6]:
        del tensors[name]


def remove_norm(tensors):
    del tensors["model.language_model.norm.weight"]


def add_stranger(tensors):
    tensors["model.language_model.stranger"] = torch.zeros(2)


def cut_norm(tensors):
    tensors["model.language_model.norm.weight"] = torch.zeros(5)


DOWN = r"base_model\.model\.model\.language_model\.layers\.0\.mlp\.down_proj\.lora_A\.weight"
NORM = r"model\.language_model\.norm\.weight"
MISFITS = {
    "adapter with a renamed key": ("lora", rename_one, rf"adapter_model.* 1 missing weights, first {DOWN}"),
    "adapter with tensors removed": ("lora", remove_six, rf"adapter_model.* 6 missing weights, first {DOWN}"),
    "checkpoint with a key missing": ("full", remove_norm, rf"trained_weights.* 1 missing weights, first {NORM}"),
    "checkpoint with a stranger": ("full", add_stranger, "trained_weights.* 1 unexpected weights, first .*stranger"),
    "checkpoint with a cut tensor": ("full", cut_norm, rf"1 misshapen weights, first {NORM} \(\[5\], not \[64\]\)"),
    "shards with a stranger": ("fsdp", add_stranger, "sharded does not fit .* 1 unexpected weights, first .*stranger"),
    "shards with a key missing": ("fsdp", remove_norm, rf"sharded does not fit .* 1 missing weights, first {NORM}"),
    "whole model with a key missing": ("final", remove_norm, rf"1 missing weights, first {NORM}"),
    "whole model with a stranger": ("final", add_stranger, "1 unexpected weights, first .*stranger"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_exactly_are_refused_by_name_by_evaluate_predict_and_merge(case, runs, copied):
    name, edit, message = MISFITS[case]
    folder = copied("full", final=True) if name == "final" else copied(name)
    file = {"fsdp": "sharded/shard-00001-model-00001-of-00001.safetensors", "final": "model.safetensors", **WEIGHTS}
    change(folder / file[name], edit)
    for load in every_loader(runs["full" if name == "final" else name], folder).values():
        with pytest.raises(UserError, match=message):
            load()


@pytest.mark.parametrize("name", ["lora", "full", "fsdp"])
def test_a_resume_refuses_weights_that_do_not_fit_exactly(name, runs, copied, monkeypatch):
    """What was changed on purpose, with hashes to match."""
    folder = copied(name)
    file = {"fsdp": "sharded/shard-00001-model-00001-of-00001.safetensors", **WEIGHTS}[name]
    change(folder / file, rename_one if name == "lora" else add_stranger)
    state = json.loads((folder / "trainer_state.json").read_text())
    state["files"][file] = (folder / file).stat().st_size
    state["sha256"] |= checkpoint.hash_files(folder, [folder / file])
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"1 (missing|unexpected) weights, first "):
        train.main(["--config", str(runs[name]), f"resume={folder}", f"output_dir={folder}-out"])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read"),
        ("adapter_config.json", lambda path: path.write_text("{ broken"), "line 1: not valid JSON"),
        ("adapter_config.json", lambda path: path.write_text('{"peft_type": "NONE"}'), "peft_type is 'NONE'"),
        ("adapter_config.json", lambda path: path.write_text("[]"), "peft_type is None"),
        ("base.json", lambda path: path.write_text("[" * 100_000), "nested too deeply"),
    ],
    ids=["truncated", "broken", "unknown type", "list", "brackets"],
)
def test_a_damaged_adapter_is_one_line_that_names_the_file(name, damage, message, runs, copied):
    folder = copied("lora", final=True)
    damage(folder / name)
    initial = {"train": lambda: train.main(["--config", str(runs["lora"]), f"init_adapter={folder}",
                                            f"output_dir={folder}-out"])}  # fmt: skip
    for load in (every_loader(runs["lora"], folder) | initial).values():
        with pytest.raises(UserError) as error:
            load()
        assert str(folder / name) in str(error.value) and message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lora", "full", "fsdp"])
def test_the_final_folder_and_the_last_checkpoint_hold_the_same_model(name, runs):
    config = load_config(runs[name])
    output = Path(config.output_dir)
    final, last = (load_trained(config, folder, CPU).state_dict() for folder in (output, output / "checkpoint-2"))
    assert final.keys() == last.keys() and all(torch.equal(final[key], last[key]) for key in final)
    assert not load_trained(config, output, CPU).training


# ------------------------------------------------------------------------------------------------------------ the base


def test_another_base_of_the_same_shapes_is_refused_at_every_load(runs, tiny_models, copied, tmp_path):
    other = tiny_models.build("qwen3_vl", seed=1)
    folder = copied("lora")
    base = tiny_models["qwen3_vl"]
    told = f"lora was trained on {base}, and model_name {other} differs from that in weights; set model_name"
    values = load_config(runs["lora"])
    config = write_config(Path(values.data.image_root), other, tmp_path / "out", save_steps=1, num_train_epochs=2,
                          warmup_steps=0)  # fmt: skip
    loads = every_loader(config, folder) | {
        "resume": lambda: train.main(["--config", str(config), f"resume={folder}", f"model_name={values.model_name}",
                                      f"model_name={other}"]),
        "init": lambda: train.main(["--config", str(config), f"init_adapter={folder}"]),
    }  # fmt: skip
    state = json.loads((folder / "trainer_state.json").read_text())
    state["config"]["model_name"] = str(other)  # or the resume would be refused for the name
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for name, load in loads.items():
        with pytest.raises(UserError) as error:
            load()
        assert told in str(error.value) and f"delete {folder / 'base.json'}" in str(error.value), name


def test_a_base_that_has_only_moved_is_the_same_and_a_change_of_config_or_tokenizer_is_said(runs, copied, tmp_path):
    folder, base = copied("lora"), tmp_path / "base"
    shutil.copytree(load_config(runs["lora"]).model_name, base)
    assert checkpoint.check_base(folder, str(base)) is None
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match="differs from that in config; set model_name"):
        checkpoint.check_base(folder, str(base))
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match="differs from that in config and tokenizer; set model_name"):
        checkpoint.check_base(folder, str(base))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_folder_without_the_record_of_its_base_is_accepted_with_a_note(name, runs, copied, capsys):
    folder = copied(name)
    (folder / "base.json").unlink()
    assert whats_wrong(folder, content=True) is None, "deleting it is how a user goes on"
    load_trained(load_config(runs[name]), folder, CPU)
    assert capsys.readouterr().out.count(f"{folder} holds no base.json") == 1


def test_a_base_is_known_again_in_the_hubs_cache_and_one_changed_tensor_makes_another(
    tiny_models, tmp_path, monkeypatch
):
    source = tiny_models["qwen3_vl"]
    snapshot = tmp_path / "models--maker--tiny" / "snapshots" / "0123"
    shutil.copytree(source, snapshot)
    refs = tmp_path / "models--maker--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    local, hub = family.fingerprint(str(source)), family.fingerprint("maker/tiny")
    assert hub == {**local, "model_name": "maker/tiny"}
    change(snapshot / "model.safetensors", lambda tensors: tensors["model.language_model.norm.weight"].add_(1))
    assert family.fingerprint("maker/tiny")["weights"] != local["weights"]


def test_a_base_is_the_same_in_one_file_or_several_and_told_from_another(tiny_models, tmp_path):
    from model import load_base

    model = load_base(str(tiny_models["qwen3_vl"]), torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    before = family.fingerprint(str(tmp_path))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for path in shards[1:]:  # none of the first file
        change(path, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    after = family.fingerprint(str(tmp_path))
    assert before["weights"] == family.fingerprint(str(tiny_models["qwen3_vl"]))["weights"] != after["weights"]


@pytest.mark.parametrize(("key", "value", "told"), [("alpha", 256, "lora.alpha 16, and this run has 256"),
                                                    ("r", 4, "lora.r 8, and this run has 4")])  # fmt: skip
def test_a_start_from_an_adapter_of_another_scale_is_refused_before_weights_load(
    key, value, told, runs, monkeypatch, tmp_path
):
    monkeypatch.setattr(train.modeling, "load_base", lambda *_: pytest.fail("weights were loaded"))
    adapter = load_config(runs["lora"]).output_dir
    arguments = [f"init_adapter={adapter}", f"lora.{key}={value}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=told):
        train.main(["--config", str(runs["lora"]), *arguments])


@pytest.mark.parametrize("key", ["r", "alpha"])
def test_an_adapter_of_another_scale_is_refused_where_it_is_scored_or_merged(runs, copied, key):
    config = load_config(runs["lora"], [f"lora.{key}=64"])
    with pytest.raises(UserError, match=rf"was trained with lora.{key} \d+, and this run has 64.*set lora.{key}="):
        load_trained(config, copied("lora"), CPU)


# ------------------------------------------------------------------------------------------------------ saved and read


@pytest.mark.parametrize("name", ["lora", "full", "fsdp"])
def test_every_file_of_a_checkpoint_is_hashed_and_a_flipped_byte_in_any_is_found(name, copied):
    folder = copied(name)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    hashed = json.loads((folder / "trainer_state.json").read_text())["sha256"]
    assert hashed.keys() == files - {"trainer_state.json", "base.json"}
    assert whats_wrong(folder, content=True) is None
    for file in hashed:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert whats_wrong(folder) is None  # cheap: sizes alone
        assert whats_wrong(folder, content=True) == f"{file} has changed since it was saved"
        (folder / file).write_bytes(content)


def test_a_checkpoint_from_before_the_hashes_can_still_be_used(copied):
    folder = copied("lora")
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["sha256"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert whats_wrong(folder, content=True) is None


def test_a_final_save_that_is_killed_between_two_files_is_not_taken_for_complete(runs, copied, monkeypatch):
    source, target = copied("lora", final=True), copied("full") / "out"
    moved = []

    def write(folder, *_):
        for path in source.iterdir():
            if path.name not in ("config.yaml", "log.jsonl", "order.jsonl"):
                shutil.copy(path, folder / path.name)

    def replace(self, path, replace=Path.replace):
        assert not checkpoint.is_final(target), "weights were there before the rest"
        moved.append(path.name)
        return replace(self, path)

    monkeypatch.setattr(checkpoint, "_write_final", write)
    monkeypatch.setattr(Path, "replace", replace)
    target.mkdir()
    checkpoint.save_final(target, None, load_config(runs["lora"]), {}, train.Ranks(0, 1, CPU))
    assert checkpoint.is_final(target) and moved[-1] == "adapter_model.safetensors" and len(moved) > 5


def test_a_full_disk_at_the_final_save_is_one_line_leaves_nothing_and_the_run_can_be_ended_later(
    runs, monkeypatch, tmp_path
):
    save_adapter = checkpoint.save_adapter

    def full_disk(model, folder):
        save_adapter(model, folder)
        if folder.name == ".final.tmp":
            raise OSError(28, "No space left on device")

    output = tmp_path / "out"
    arguments = ["--config", str(runs["lora"]), f"output_dir={output}"]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_adapter", full_disk)
        with pytest.raises(UserError, match=r"cannot save .*out .*GB are free there"):
            train.main(arguments)
    assert not list(output.glob(".*tmp*")) and not checkpoint.is_final(output)
    assert (output / "checkpoint-2").is_dir()
    train.main(arguments)
    assert checkpoint.is_final(output)
    expected = Path(load_config(runs["lora"]).output_dir) / "adapter_model.safetensors"
    assert (output / "adapter_model.safetensors").read_bytes() == expected.read_bytes()


def test_a_broken_checkpoint_of_the_same_step_is_saved_anew(runs, tmp_path):
    output = shutil.copytree(load_config(runs["lora"]).output_dir, tmp_path / "out")
    optimizer = output / "checkpoint-2" / "optimizer.safetensors"
    before = optimizer.read_bytes()
    optimizer.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    (output / "adapter_model.safetensors").unlink()
    train.main(["--config", str(runs["lora"]), f"output_dir={output}"])
    assert optimizer.read_bytes() == before and whats_wrong(output / "checkpoint-2", content=True) is None
    assert run_folder.newest_complete(output) == (output / "checkpoint-2", [])


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimizers_state_is_put_back_where_adamw_keeps_it(tmp_path, fused):
    """The fused kernels want the step count beside the parameter, the others on the CPU."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    parameter.grad = torch.ones(3)
    optimizer.step()
    checkpoint.save_optimizer(optimizer, {"p": parameter}, tmp_path / "optimizer.safetensors")
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    resumed = SimpleNamespace(defaults=optimizer.defaults, state={})
    checkpoint.load_optimizer(resumed, {"p": elsewhere}, tmp_path / "optimizer.safetensors")
    devices = {key: value.device.type for key, value in resumed.state[elsewhere].items()}
    assert devices == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
