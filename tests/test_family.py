"""What differs between the families is read from the model's own files, without its weights."""

import json
import shutil

import pytest
from conftest import shared_data
from support.tiny_runs import FAMILIES

from errors import UserError
from family import COORDINATES, load_family


@pytest.mark.parametrize(
    ("name", "factor", "coordinates"),
    [
        ("qwen2_vl", 28, "relative"),
        ("qwen2_5_vl", 28, "absolute"),
        ("qwen3_vl", 32, "relative"),
        ("qwen3_5", 32, "relative"),
    ],
)
def test_each_family_has_its_grid_and_its_coordinates(tiny_models, name, factor, coordinates):
    family = load_family(str(tiny_models[name]))
    assert (family.model_type, family.factor, family.coordinates) == (name, factor, coordinates)
    assert family.has_vision and family.merge_size == 2 and family.temporal_patch_size == 2


@pytest.mark.parametrize(
    ("name", "published"),
    [("qwen2_5_vl", "configs/Qwen2.5-VL-7B-Instruct"), ("qwen3_vl", "configs/Qwen3-VL-Instruct")],
)
def test_the_numbers_are_those_of_the_published_preprocessor_file(tiny_models, tmp_path, name, published):
    """A real model's folder holds these two files; the sizes of the model do not matter here."""
    shutil.copyfile(tiny_models[name] / "config.json", tmp_path / "config.json")
    shutil.copyfile(shared_data(published) / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    size = values.get("size") or {"shortest_edge": values["min_pixels"], "longest_edge": values["max_pixels"]}
    family = load_family(str(tmp_path))
    assert (family.min_pixels, family.max_pixels) == (size["shortest_edge"], size["longest_edge"])
    assert (family.patch_size, family.merge_size) == (values["patch_size"], values["merge_size"])
    assert family.image_mean == tuple(values["image_mean"]) and family.image_std == tuple(values["image_std"])
    assert family.rescale_factor == 1 / 255


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_known_before_any_weights_are_there(tiny_models, tmp_path, name):
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(tiny_models[name] / file, tmp_path / file)
    assert load_family(str(tmp_path)) == load_family(str(tiny_models[name]))


def test_a_text_model_has_no_vision(tiny_models):
    family = load_family(str(tiny_models["qwen2"]))
    assert not family.has_vision and family.coordinates is None


def test_the_text_part_of_a_qwen3_5_is_a_text_model_with_recurrent_layers(tiny_models, tmp_path):
    text = json.loads((tiny_models["qwen3_5"] / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps({**text, "architectures": ["Qwen3_5ForCausalLM"]}))
    family = load_family(str(tmp_path))
    assert (family.model_type, family.has_vision, family.is_recurrent) == ("qwen3_5_text", False, True)
    assert not load_family(str(tiny_models["qwen3_vl"])).is_recurrent


def test_a_size_of_768_fits_qwen3_vl_and_is_an_error_with_756_and_784_on_the_older_families(tiny_models):
    load_family(str(tiny_models["qwen3_vl"])).check_image_size(768, "exp.yaml")
    for name in ("qwen2_vl", "qwen2_5_vl"):
        family = load_family(str(tiny_models[name]))
        with pytest.raises(UserError, match=r"exp\.yaml: key 'image_size' is 768.* 756 or 784"):
            family.check_image_size(768, "exp.yaml")
        family.check_image_size(756, "exp.yaml")


def test_a_size_below_one_image_token_names_the_smallest_that_fits(tiny_models):
    with pytest.raises(UserError, match=r"use 32$"):
        load_family(str(tiny_models["qwen3_vl"])).check_image_size(20, "c.yaml")


def test_letterbox_without_a_size_names_the_key_and_the_multiple(tiny_models):
    with pytest.raises(UserError, match="needs key 'image_size', a multiple of 32"):
        load_family(str(tiny_models["qwen3_vl"])).check_image_size(None, "c.yaml")


def one_line(model_name) -> str:
    with pytest.raises(UserError) as caught:
        load_family(str(model_name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_kind_of_model_is_refused_with_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    error = one_line(tmp_path)
    assert "is a bert" in error and all(family in error for family in COORDINATES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe"}))
    error = one_line(tmp_path)
    assert "is a qwen3_5_moe (a mixture of experts); supported: " in error


def test_a_folder_that_is_no_model_or_lacks_its_image_processor_is_named(tiny_models, tmp_path):
    assert "no/such/folder" in one_line("no/such/folder")
    assert str(tmp_path) in one_line(tmp_path)
    (tmp_path / "config.json").write_text("{ broken")
    assert str(tmp_path) in one_line(tmp_path)
    shutil.copyfile(tiny_models["qwen3_vl"] / "config.json", tmp_path / "config.json")
    assert "preprocessor_config.json" in one_line(tmp_path)


def test_image_processor_and_model_that_contradict_each_other_are_named_with_both_values(tiny_models, tmp_path):
    for key, value in (("patch_size", 14), ("merge_size", 4), ("temporal_patch_size", 1)):
        folder = shutil.copytree(tiny_models["qwen3_vl"], tmp_path / key)
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**processor, key: value}))
        told = f"preprocessor_config.json says {key} {value}, and config.json {processor[key]}"
        assert told in one_line(folder)


def test_without_network_a_name_that_is_not_cached_costs_one_question_and_one_line(monkeypatch, capfd):
    """By itself, transformers retries for 24 s and prints each failure."""
    import huggingface_hub

    asked = []

    class NoNetwork:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", NoNetwork)
    error = one_line("some-maker/some-model")
    assert "HF_HOME" in error and "HF_HUB_OFFLINE=1" in error and "hf download some-maker/some-model" in error
    one_line("some-maker/another-model")
    assert len(asked) == 1 and asked[0][1] <= 5 and capfd.readouterr() == ("", "")


def test_with_a_folder_the_hub_is_not_asked(tiny_models, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the hub was asked"))
    load_family(str(tiny_models["qwen3_vl"]))
