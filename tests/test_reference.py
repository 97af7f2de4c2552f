"""merged/reference.py: what a merged folder promises is asked of a server and of a copy, and what differs is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_runs
from support.stand_in_server import Served, serve

import merge
import predict
from checkpoint import save_adapter
from config import load_config, to_yaml
from errors import UserError
from merged import reference
from preflight import open_encoder


@pytest.fixture(scope="module")
def merged(tiny_models):
    """A merged folder whose prompts have a system turn and candidates."""
    return merge_tiny(tiny_models, "qwen3_vl")


@pytest.fixture(scope="module")
def merged_thinker(tiny_models):
    """The same of a family that thinks unless it is told not to."""
    return merge_tiny(tiny_models, "qwen3_5")


def merge_tiny(tiny_models, family):
    run = tiny_runs.tiny_run(tiny_models, family)
    folder = tiny_models.root / f"reference {family}"
    config = tiny_runs.write_config(
        run.folder, run.model_folder, family, template="ultra_condensed", output_dir=str(folder / "out")
    )
    (folder / "out").mkdir(parents=True)
    save_adapter(run.model(), folder / "out")
    (folder / "out" / "config.yaml").write_text(to_yaml(load_config(config)))
    merge.main(["--adapter-path", str(folder / "out"), "--out", str(folder / "merged")])
    return folder / "merged"


def verify(capsys, folder, target):
    """(exit code, printed lines)"""
    capsys.readouterr()
    code = 0
    try:
        predict.main(["--adapter-path", str(folder), "--verify", str(target)])
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out.splitlines()


def test_the_references_hold_the_prompt_of_training_and_the_folders_own_answer(merged):
    config = load_config(merged / "finetune_config.yaml", [f"model_name={merged}"])
    references = reference.read(merged)
    assert [line["id"] for line in references] == ["red disc", "green disc", "blue disc"]
    asked = list(reference.prompts(config, open_encoder(config, "config")))
    for line, again in zip(references, asked, strict=True):
        assert {key: line[key] for key in again} == again
        assert line["prompt_ids"].count(line["image_token_id"]) == sum(line["image_tokens"]) == 16
        assert line["messages"][0]["role"] == "system" and "Candidates: red; green; blue" in str(line["messages"][-1])
        assert len(line["logprobs"]) >= 1 and isinstance(line["answer"], str)
    assert (merged / reference.FILE).stat().st_size < 100_000


@pytest.mark.parametrize(
    ("wrong", "named", "not_named"),
    [
        ("resizes", "pixels: the image is resized, it has 4 tokens instead of 16", "prompt:"),
        ("drops system", "the system prompt is dropped, the count is the same without it", "pixels:"),
        ("drops image", "pixels: the image does not reach the model", "prompt:"),
    ],
)
def test_a_server_that_shows_the_model_something_else_is_named_by_what_it_does(merged, capsys, wrong, named, not_named):
    with serve(Served(merged, wrong)) as address:
        code, lines = verify(capsys, merged, address)
    assert code == 1 and lines[-1].endswith("0 of 3 references agree")
    for line in lines[:-1]:
        assert named in line and not_named not in line


@pytest.mark.parametrize(
    ("wrong", "named", "not_named"),
    [
        ("resizes", "pixels: the image is resized, it has 4 tokens instead of 16", "prompt:"),
        ("drops system", "the system prompt is dropped, the count is the same without it", "pixels:"),
        ("thinks", "the model is asked to think", "pixels:"),
    ],
)
def test_a_server_of_a_qwen3_5_that_does_so_is_named_and_so_is_one_that_lets_it_think(
    merged_thinker, capsys, wrong, named, not_named
):
    with serve(Served(merged_thinker, wrong)) as address:
        code, lines = verify(capsys, merged_thinker, address)
    assert code == 1 and lines[-1].endswith("0 of 3 references agree")
    assert all(named in line and not_named not in line for line in lines[:-1]), lines


def test_a_server_of_a_qwen3_5_that_is_right_agrees_and_so_does_its_folder(merged_thinker, capsys):
    with serve(Served(merged_thinker)) as address:
        for target in (address, merged_thinker):
            code, lines = verify(capsys, merged_thinker, target)
            assert code == 0 and lines[-1].endswith("3 of 3 references agree"), lines


def test_a_server_that_is_right_agrees(merged, capsys):
    with serve(Served(merged)) as address:
        for form in (address, address.removesuffix("/v1"), address + "/chat/completions"):
            code, lines = verify(capsys, merged, form)
            assert code == 0 and lines[-1].endswith("3 of 3 references agree"), lines
    assert all("16 of them the image's" in line and "within 0.0" in line for line in lines[:-1])


def test_other_weights_under_the_right_prompt_are_named(merged, tiny_models, capsys):
    base = tiny_models["qwen3_vl"]
    with serve(Served(merged, weights=base)) as address:
        code, lines = verify(capsys, merged, address)
    assert code == 1 and any("look for other weights" in line for line in lines)
    assert not any("prompt:" in line or "pixels:" in line for line in lines)


def test_a_server_that_tells_no_counts_is_judged_by_its_answers_and_that_is_said(merged, capsys):
    with serve(Served(merged, "tells nothing")) as address:
        code, lines = verify(capsys, merged, address)
    assert code == 0 and all("not told (no usage.prompt_tokens)" in line for line in lines[:-1])


def test_a_folder_is_verified_token_by_token(merged, capsys, tmp_path):
    assert verify(capsys, merged, merged)[0] == 0
    copy = shutil.copytree(merged, tmp_path / "copy")
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template.replace("<|im_start|>assistant", "<|im_start|>assistant "))
    code, lines = verify(capsys, merged, copy)
    assert code == 1 and all("prompt: it differs from token" in line for line in lines[:-1])

    copy = shutil.copytree(merged, tmp_path / "resized")
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    processor["size"] = {"longest_edge": 32 * 32, "shortest_edge": 32 * 32}
    (copy / "preprocessor_config.json").write_text(json.dumps(processor))
    code, lines = verify(capsys, merged, copy)
    assert code == 1 and all("pixels: the image is resized" in line for line in lines[:-1])

    copy = shutil.copytree(merged, tmp_path / "weights")
    state = load_file(copy / "model.safetensors")
    state = {name: tensor + torch.randn(tensor.shape).to(tensor) * 0.05 for name, tensor in state.items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    code, lines = verify(capsys, merged, copy)
    assert code == 1 and any("answer:" in line for line in lines)


@pytest.mark.parametrize(
    ("target", "folder", "message"),
    [
        ("http://127.0.0.1:9/v1", None, "no answer from an OpenAI-compatible server"),
        (None, "{tmp}", "merge the adapter again"),
        ("{tmp}", None, "no whole model loads from there"),
    ],
)
def test_what_cannot_be_verified_is_one_line(merged, tmp_path, target, folder, message):
    target, folder = ((text or str(merged)).format(tmp=tmp_path) for text in (target, folder))
    with pytest.raises(UserError, match=message):
        predict.main(["--adapter-path", folder, "--verify", target])


def test_a_merged_folder_that_shows_images_otherwise_than_training_is_not_written(merged, tiny_models, monkeypatch):
    config = load_config(merged / "finetune_config.yaml", [f"model_name={merged}"])
    encoder = open_encoder(config, "config")
    asked = list(reference.prompts(config, encoder))
    monkeypatch.setattr(reference, "prompts", lambda *_: [{**asked[0], "grid": [[1, 2, 2]]}])
    model = merge.load_plainly(merged)
    before = (merged / reference.FILE).read_bytes()
    with pytest.raises(
        UserError, match=r"training did \(pixels: the image is resized.*; nothing was written; train with images"
    ):
        reference.write(config, encoder, model, merged)
    assert (merged / reference.FILE).read_bytes() == before
