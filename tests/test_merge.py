"""merge.py: adapter and base -> one plain model folder, checked, described and pushed."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import click_runs, tiny_runs
from support.stand_in_hub import StandInHub
from support.tiny_runs import run_script

import merge
import predict
import train
from checkpoint import load_trained
from config import load_config
from errors import UserError
from images import letterbox, open_image
from merged import publish
from run_folder import config_of

FAMILIES = tiny_runs.FAMILIES
TOKEN = "hf_plantedPLANTEDplantedPLANTEDplanted"


@pytest.fixture
def run(tiny_models):
    return click_runs.click_run(tiny_models, "qwen3_vl")


def merged_folder(run, out, *arguments):
    merge.main(["--adapter-path", str(run / "out"), "--out", str(out), *map(str, arguments)])
    return out


@pytest.fixture(scope="module")
def merged(tiny_models):
    """family -> the merged folder of its click run, made once."""
    made = {}

    def of(family):
        if family not in made:
            out = tiny_models.root / f"merged-{family}"
            made[family] = merged_folder(click_runs.click_run(tiny_models, family), out)
        return made[family]

    return of


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


# --------------------------------------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_folder_loads_plainly_and_gives_the_adapters_answers(tiny_models, merged, family):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    run, folder = click_runs.click_run(tiny_models, family), merged(family)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for line in click_runs.predictions(run):  # of the adapter
        image, _ = letterbox(open_image(run / line["images"][0]), tiny_runs.IMAGE_SIZE[family])
        pixels = processor(images=[image], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": line["instruction"]}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        image_tokens = int(pixels["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens), return_tensors="pt")
        image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        answer = model.generate(
            **ids, **pixels, mm_token_type_ids=(ids["input_ids"] == image_id).int(), max_new_tokens=20
        )  # no word about sampling: the folder's generation config answers greedily
        said = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == line["prediction"]


def test_predict_answers_alike_from_adapter_and_merged_folder(run, merged, capsys):
    def answer(folder):
        predict.main(["--adapter-path", str(folder), "--image", str(run / "green.png"), "--prompt",
                      "click the green button"])  # fmt: skip
        return capsys.readouterr().out.partition("Loaded in")[0]

    folder = merged("qwen3_vl")
    capsys.readouterr()
    assert answer(run / "out") == answer(folder) != ""


def test_every_merged_weight_is_the_float32_sum_rounded_once_and_all_others_are_the_bases_own(tiny_models, tmp_path):
    from peft import PeftModel

    model = tiny_models.build("qwen3_vl", dtype="bfloat16")
    click_runs.write_screens(tmp_path / "run")
    config = click_runs.write_config(tmp_path / "run", model, "qwen3_vl", num_train_epochs=3)
    train.main(["--config", str(config)])
    folder = merged_folder(tmp_path / "run", tmp_path / "merged")
    base, merged = weights(model), weights(folder)
    assert base.keys() == merged.keys()
    peft_model = PeftModel.from_pretrained(
        merge.modeling.load_base(str(model), torch.float32), tmp_path / "run" / "out"
    )
    changed = 0
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight("default").detach()
            expected = (base[f"{name}.weight"].float() + delta).to(torch.bfloat16)
            assert torch.equal(merged.pop(f"{name}.weight"), expected)
            changed += int(not torch.equal(base[f"{name}.weight"], expected))
    assert changed == 14  # 7 linear layers in each of 2 decoder layers
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, base[name]) for name, tensor in merged.items())


def test_an_adapter_trained_on_a_4_bit_base_merges_into_the_full_precision_base(tiny_models, tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes (requirements-extra.txt)")
    model = tiny_models.build("qwen3_vl", hidden_size=128, intermediate_size=256)
    click_runs.write_screens(tmp_path / "run")
    config = click_runs.write_config(
        tmp_path / "run", model, "qwen3_vl", num_train_epochs=3, quantization="nf4", learning_rate=1e-3
    )
    train.main(["--config", str(config)])
    folder = merged_folder(tmp_path / "run", tmp_path / "merged")
    base, merged = weights(model), weights(folder)
    assert {name: tensor.shape for name, tensor in base.items()} == {name: t.shape for name, t in merged.items()}
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    assert "4-bit" in (folder / "README.md").read_text() and "nf4" in (folder / "README.md").read_text()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_fully_fine_tuned_checkpoint_becomes_a_plain_folder_too(parallel, tiny_models, tmp_path):
    click_runs.write_screens(tmp_path / "run")
    config = click_runs.write_config(tmp_path / "run", tiny_models["qwen3_vl"], "qwen3_vl", num_train_epochs=2,
                                     finetuning="full", parallel=parallel, learning_rate=1e-3)  # fmt: skip
    train.main(["--config", str(config)])
    (checkpoint,) = (tmp_path / "run" / "out").glob("checkpoint-*")
    merge.main(["--adapter-path", str(checkpoint), "--out", str(tmp_path / "merged")])
    merged, before = weights(tmp_path / "merged"), weights(tiny_models["qwen3_vl"])
    trained = weights(tmp_path / "run" / "out")
    assert merged.keys() == before.keys() and all(torch.equal(merged[name], trained[name]) for name in merged)
    assert any(not torch.equal(merged[name], before[name]) for name in merged)


def test_the_folder_holds_what_others_expect_and_the_bases_own_small_files_word_for_word(tiny_models, merged):
    base, folder = tiny_models["qwen3_vl"], merged("qwen3_vl")
    names = {path.name for path in folder.iterdir()}
    same = {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
            "preprocessor_config.json", "video_preprocessor_config.json"}  # fmt: skip
    own = {"README.md", "finetune_config.yaml", "coordinates.json", "generation_config.json", "model.safetensors",
           "reference_answers.jsonl"}  # fmt: skip
    assert names == same | own
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in same)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is False and not set(merge.SAMPLING) & generation.keys()


def test_a_large_model_is_saved_in_shards_that_load_again(run, monkeypatch, tmp_path):
    monkeypatch.setattr(merge, "SHARD_SIZE", "400KB")
    folder = merged_folder(run, tmp_path / "merged")
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    load_trained(config_of(folder), folder, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- the checks


@pytest.fixture
def broken_run(run, tmp_path):
    """A copy of the run whose adapter a test may spoil."""
    shutil.copytree(run / "out", tmp_path / "run" / "out")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_an_adapter_with_a_missing_or_unexpected_key_is_refused_by_name(broken_run, tmp_path, kind):
    path = broken_run / "out" / "adapter_model.safetensors"
    state = load_file(path)
    name = sorted(state)[3]
    if kind == "missing":
        del state[name]
    else:
        name = name.replace("layers.0", "layers.7")
        state[name] = torch.zeros(2, 2)
    save_file(state, path)
    with pytest.raises(UserError, match=f"1 {kind} weights, first {name.replace('.', '[.]')}"):
        merged_folder(broken_run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_merged_folder_with_a_missing_or_unexpected_key_is_refused(merged, tmp_path, kind):
    folder = shutil.copytree(merged("qwen3_vl"), tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    if kind == "missing":
        del state["model.language_model.norm.weight"]
    else:
        state["model.language_model.norm.extra"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 {kind}_keys, first model.language_model.norm"):
        merge.load_plainly(folder)


def test_a_merge_that_loses_the_adapter_is_noticed_and_not_written(run, monkeypatch, tmp_path):
    monkeypatch.setattr(merge, "merged_into_base", lambda model: model.unload())
    with pytest.raises(UserError, match=r"torch\.float32 is 0\.0001\. The merge is not written"):
        merged_folder(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_said_before_anything_is_written(run, monkeypatch, tmp_path):
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2_000_000, 1_600_000, 400_000))
    with pytest.raises(UserError, match=r"needs 0\.001 GB, and 0\.000 GB are free"):
        merged_folder(run, tmp_path / "new" / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_no_number_is_noticed(broken_run, tmp_path):
    path = broken_run / "out" / "adapter_model.safetensors"
    state = load_file(path)
    state[sorted(state)[0]].fill_(float("nan"))
    save_file(state, path)
    with pytest.raises(UserError, match="by nan of their spread"):
        merged_folder(broken_run, tmp_path / "merged")


def test_an_adapter_that_changes_nothing_is_said_to_prove_little():
    logits = torch.randn(5, 100)
    told = merge.compare(logits, logits, logits, "one sample", torch.float32)
    assert "proves little" in told
    assert "proves little" not in merge.compare(logits, logits, logits.flip(0), "one sample", torch.float32)


def test_without_the_runs_data_a_drawn_image_serves_for_the_check(run, capsys, tmp_path):
    merged_folder(run, tmp_path / "merged", "data.val=gone.json", "data.test=gone.json", "data.train=gone.json")
    assert "checked on a drawn image" in capsys.readouterr().out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "On a drawn image (" in card and "| train | not at hand |" in card
    assert not (tmp_path / "merged" / "drawn.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{run}"], "exists already"),
        (["--adapter-path", "{tmp}"], "--config FILE"),
        (["--adapter-path", "{tmp}/no"], "is no folder"),
        (["image_size=160"], "image_size 128, here 160"),
        (["--out", "{run}/run.yaml/x"], "run.yaml is no folder; give another place"),
        (["--push", "no-slash"], "USER/REPO"),
        (["--push", "a/b"], "set HF_TOKEN in the environment"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(merge, "load_trained", lambda *_: pytest.fail("weights were loaded"))
    arguments = [text.format(run=run, tmp=tmp_path) for text in arguments]
    with pytest.raises(UserError, match=message):
        merge.main(["--adapter-path", str(run / "out"), "--out", str(tmp_path / "merged"), *arguments])


# ------------------------------------------------------------------------------------------------- card and upload


def test_the_model_card_has_config_counts_scores_and_check_and_no_path_of_this_machine(run, merged):
    folder = merged("qwen3_vl")
    card = (folder / "README.md").read_text()
    assert re.search(r"\| predict_accuracy \| 1 \(0\.\d+ to 1\) \|", card)
    for text in ("| train | 3 |", "  r: 16\n",
                 "those of base and adapter by", "tags: [click]", "`coordinates.json`"):  # fmt: skip
        assert text in card
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text()
            assert str(run) not in text and str(run.parent) not in text and "/" + run.parent.name not in text


def test_scores_of_other_weights_do_not_get_into_the_card(run, tmp_path, capsys):
    (checkpoint,) = (run / "out").glob("checkpoint-*")
    merge.main(["--adapter-path", str(checkpoint), "--out", str(tmp_path / "merged")])
    assert "the model card goes without them" in capsys.readouterr().out
    assert "Not evaluated yet." in (tmp_path / "merged" / "README.md").read_text()


def test_a_hub_name_is_kept_and_a_folder_is_reduced_to_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "me").mkdir(parents=True)
    assert publish.is_hub_name("Qwen/Qwen3-VL-8B-Instruct")
    assert not publish.is_hub_name("home/me") and not publish.is_hub_name(str(tmp_path / "home"))


def test_the_merged_config_is_a_config_and_keeps_the_convention(run, merged):
    folder = merged("qwen3_vl")
    config = load_config(folder / "finetune_config.yaml")
    assert config.lora.r == 16 and config.task == "click"
    assert (folder / "coordinates.json").read_bytes() == (run / "out" / "coordinates.json").read_bytes()
    with pytest.raises(UserError, match="image_size 128, here 160"):
        predict.main(
            ["--adapter-path", str(folder), "--image", str(run / "red.png"), "--prompt", "?", "image_size=160"]
        )
    assert "coordinates.json" in publish.ALLOWED


def run_merge(hub, home, *arguments, token=TOKEN):
    """`python merge.py ...` in a process of its own, with the stand-in as its hub."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(home)}  # fmt: skip
    return subprocess.run(
        [sys.executable, "merge.py", *map(str, arguments)],
        cwd=tiny_runs.REPO_ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_push_uploads_exactly_the_folder_and_the_token_is_found_nowhere(run, tmp_path):
    out = tmp_path / "merged"
    with StandInHub(TOKEN) as hub:
        done = run_merge(hub, tmp_path / "home", "--adapter-path", run / "out", "--out", out, "--push", "someone/model")
    assert done.returncode == 0, done.stderr
    assert "Pushed to http://127.0.0.1" in done.stdout
    assert hub.created["someone/model"]["visibility"] == "private"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert TOKEN not in done.stdout + done.stderr
    seen = [path for root in (tmp_path, run) for path in root.rglob("*") if path.is_file()]
    assert len(seen) > 20
    assert not [path for path in seen if TOKEN.encode() in path.read_bytes()]


@pytest.fixture
def online(monkeypatch):
    """online(hub) lets this process reach the stand-in hub, with the token. (huggingface_hub reads these at import.)"""

    def online(hub):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    return online


def test_a_stranger_in_the_folder_stops_the_upload_before_anything_is_sent(merged, online, tmp_path):
    folder = shutil.copytree(merged("qwen3_vl"), tmp_path / "merged")
    (folder / "notes.txt").write_text("private")
    (folder / ".env").write_text(TOKEN)
    with StandInHub(TOKEN) as hub:
        online(hub)
        code, _, err = run_script("merge.py", "--out", folder, "--push", "someone/model")
    assert code == 2 and not hub.files and not hub.created
    assert err.count("\n") == 1 and "holds .env, notes.txt" in err


def test_a_refused_token_ends_before_the_merge_without_showing_the_token(run, online, tmp_path):
    with StandInHub("another") as hub:
        online(hub)
        code, out, err = run_script(
            "merge.py", "--adapter-path", run / "out", "--out", tmp_path / "merged", "--push", "someone/model"
        )
    assert hub.requests, "the hub was asked"
    assert code == 2 and not (tmp_path / "merged").exists()
    assert "the hub does not accept the token" in err and "Traceback" not in err
    assert TOKEN not in out + err


def test_a_failed_upload_keeps_the_folder_and_says_how_to_push_it_again(merged, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError(f"403 for Bearer {TOKEN}")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError) as error:
        publish.push(merged("qwen3_vl"), "someone/model")
    assert "403 for Bearer ***" in str(error.value) and TOKEN not in str(error.value)
    assert f"python merge.py --out {merged('qwen3_vl')} --push someone/model" in str(error.value)


def test_the_slurm_job_hands_its_arguments_to_merge_and_asks_for_no_token_on_the_command_line():
    text = (tiny_runs.REPO_ROOT / "slurm/merge_and_push.slurm").read_text()
    assert 'python merge.py "$@"' in text
    assert "HF_TOKEN=... sbatch" in text and "--token" not in text
