"""Every mistake in a config is named before a GPU is touched: key, file, and the nearest thing that would be right."""

import dataclasses

import pytest
import yaml

import config
from config import load_config
from errors import UserError

MINIMAL = """
experiment: EXP
model_name: some/model
task: vqa
data: {train: train.json}
output_dir: out
results_dir: results
learning_rate: 2e-5
"""


def load(tmp_path, text: str = "", overrides=(), base: str = MINIMAL):
    path = tmp_path / "c.yaml"
    path.write_text(base + text, encoding="utf-8")
    return load_config(path, overrides)


def message(tmp_path, text: str = "", overrides=(), base: str = MINIMAL) -> str:
    """The one-line error of a config that must be refused; it names the file."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, overrides, base)
    assert "\n" not in str(caught.value)
    assert "c.yaml" in str(caught.value) or overrides
    return str(caught.value)


def test_a_minimal_file_gets_the_defaults_of_every_other_key(tmp_path):
    loaded = load(tmp_path)
    assert (loaded.lora.r, loaded.lora.alpha, loaded.lora.dropout) == (16, 32, 0.05)
    assert loaded.data.image_root == "." and loaded.data.val is None
    assert loaded.vision_frozen and loaded.projector_frozen and loaded.share_prefix
    assert not loaded.gradient_checkpointing and loaded.order == "sequential" and loaded.resume == "auto"


def test_a_config_cannot_be_changed_after_loading(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(tmp_path).train_bs = 1


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("learningrate: 1", "'learning_rate'"),
        ("warmup_step: 1", "'warmup_steps'"),
        ("grad_acum: 1", "'grad_accum'"),
        ("lora: {rank: 8, alpha: 3}", "lora.rank"),
        ("lora: {alfa: 3}", "'lora.alpha'"),
        ("zzzz: 1", "valid keys: experiment, model_name"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_an_unknown_key_is_fatal_and_the_nearest_valid_one_is_named(tmp_path, text, nearest):
    error = message(tmp_path, text)
    assert "unknown key" in error and nearest in error


@pytest.mark.parametrize("key", ["experiment", "model_name", "task", "data", "output_dir", "results_dir"])
def test_a_missing_key_is_fatal_and_named(tmp_path, key):
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    assert f"key '{key}' is missing" in message(tmp_path, base="\n".join(lines))


def test_a_set_that_is_only_for_testing_needs_no_training_file_and_training_names_the_key(tmp_path):
    loaded = load(tmp_path, base=MINIMAL.replace("train: train.json", f"test: {tmp_path}/t.json"))
    (tmp_path / "t.json").write_text("[]")
    config.check_data_files(loaded, ["test"])
    with pytest.raises(UserError, match=r"key 'data\.train' is not set"):
        config.check_data_files(loaded, ["train"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train_bs: four", "'train_bs' is 'four' but must be a whole number"),
        ("train_bs: 2.5", "'train_bs' is 2.5 but must be a whole number"),
        ("train_bs: true", "'train_bs' is True but must be a whole number"),
        ("train_bs: 0", "'train_bs' is 0 but must be at least 1"),
        ("train_bs: [1]", "'train_bs' is [1] but must be a whole number"),
        ("train_bs:", "'train_bs' is None but must be a whole number"),
        ("weight_decay: .nan", "'weight_decay' is nan but must be a number"),
        ("max_grad_norm: .inf", "'max_grad_norm' is inf but must be a number"),
        ("max_grad_norm: 0", "'max_grad_norm' is 0.0 but must be above 0"),
        ("num_train_epochs: 0", "must be above 0"),
        ("vision_frozen: 1", "'vision_frozen' is 1 but must be true or false"),
        ("share_prefix: 'yes'", "'share_prefix' is 'yes' but must be true or false"),
        ("order: imagse", "did you mean 'images'?"),
        ("resize: stretch", "must be 'letterbox' or 'native'"),
        ("save_steps: sometimes", "must be a whole number or 'epoch'"),
        ("lora: 16", "'lora' is 16 but must be a group of keys"),
        ("lora: {dropout: 1.0}", "'lora.dropout' is 1.0 but must be below 1"),
        ("lora: {r: 0}", "'lora.r' is 0 but must be at least 1"),
        ("seed: -1", "'seed' is -1 but must be at least 0"),
        (f"seed: {2**64}", f"'seed' is {2**64} but must be at most {2**64 - 1}"),
        ("template: ''", "'template' is '' but must be a text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_fatal_and_says_what_is_right(tmp_path, text, told):
    assert told in message(tmp_path, text)


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002", "'2e-5'", "2E-5"])
def test_a_learning_rate_without_a_dot_is_a_number_though_yaml_reads_a_text(tmp_path, text):
    loaded = load(tmp_path, base=MINIMAL.replace("2e-5", text))
    assert loaded.learning_rate == 2e-5 and isinstance(loaded.learning_rate, float)


def test_whole_numbers_and_fractions_become_the_type_of_their_key(tmp_path):
    loaded = load(tmp_path, "num_train_epochs: 3\ntrain_bs: 4.0\nlora: {alpha: 64.0}\nsave_steps: epoch\n")
    assert loaded.num_train_epochs == 3.0 and isinstance(loaded.num_train_epochs, float)
    assert loaded.train_bs == 4 and isinstance(loaded.train_bs, int)
    assert loaded.lora.alpha == 64 and loaded.save_steps == "epoch"


@pytest.mark.parametrize("text", ["train_bs: 2\ntrain_bs: 3\n", "lora:\n  r: 2\n  r: 4\n"])
def test_a_key_given_twice_is_fatal_where_yaml_lets_the_last_win(tmp_path, text):
    assert "given twice" in message(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("num_labels: 2", ["num_labels", "cls"]),
        ("backbone_learning_rate: 1e-6", ["backbone_learning_rate", "cls"]),
        ("quantization: nf4\nfinetuning: full", ["nf4", "finetuning"]),
        ("parallel: fsdp", ["fsdp", "LoRA"]),
        ("resize: native\nimage_size: 768", ["image_size", "max_pixels"]),
        ("max_pixels: 100000", ["max_pixels", "image_size"]),
        ("init_adapter: a\nfinetuning: full", ["init_adapter", "finetuning"]),
    ],
)
def test_keys_that_contradict_each_other_are_fatal(tmp_path, text, keys):
    error = message(tmp_path, text)
    assert all(key in error for key in keys)


def test_classification_needs_its_number_of_labels(tmp_path):
    assert "num_labels" in message(tmp_path, base=MINIMAL.replace("vqa", "cls"))
    assert load(tmp_path, "num_labels: 2", base=MINIMAL.replace("vqa", "cls")).num_labels == 2


def test_overrides_on_the_command_line_win_over_the_file(tmp_path):
    overrides = ["train_bs=2", "grad_accum=16", "lora.r=32", "learning_rate=1e-4", "max_samples=", "order=random"]
    loaded = load(tmp_path, "train_bs: 8\nmax_samples: 5\nlora: {alpha: 7}\n", overrides)
    assert (loaded.train_bs, loaded.grad_accum, loaded.learning_rate) == (2, 16, 1e-4)
    assert (loaded.lora.r, loaded.lora.alpha) == (32, 7), "an override of one nested key leaves its neighbours"
    assert loaded.max_samples is None and loaded.order == "random"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train_bs", "argument 'train_bs' is not key=value"),
        ("=3", "argument '=3' is not key=value"),
        ("train_bs=[1", "the value cannot be parsed"),
        ("trian_bs=3", "did you mean 'train_bs'?"),
        ("lora.rnk=3", "unknown key 'lora.rnk'"),
        ("train_bs.x=3", "'train_bs' is {'x': 3}"),
        ("learning_rate=fast", "'learning_rate' is 'fast' but must be a number"),
    ],
)
def test_a_wrong_override_is_fatal_and_named(tmp_path, override, told):
    assert told in message(tmp_path, overrides=[override])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected `key: value` lines"),
        (b"- a\n- b\n", "found list"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: \xff\xfe\n", "UTF-8"),
        (b"? [1, 2]\n: 3\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_named(tmp_path, content, told):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert told in str(caught.value) and "c.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_in_its_place_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_config(path)


def test_environment_variables_in_paths_are_filled_in_and_an_unset_one_is_fatal(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_HERE", "/some/place")
    loaded = load(tmp_path, base=MINIMAL.replace("train.json", "$DATA_HERE/t.json"))
    assert loaded.data.train == "/some/place/t.json"
    assert "environment variable" in message(tmp_path, base=MINIMAL.replace("train.json", "$NOT_SET_HERE/t.json"))


def test_the_resolved_config_read_again_is_the_same_config(tmp_path):
    loaded = load(tmp_path, "lora: {r: 8}\nnum_train_epochs: 2.5\neval_steps: epoch\n")
    again = tmp_path / "resolved.yaml"
    again.write_text(config.to_yaml(loaded), encoding="utf-8")
    assert load_config(again) == loaded


def test_missing_data_files_are_named_with_their_key(tmp_path):
    loaded = load(tmp_path, base=MINIMAL.replace("train: train.json", f"train: {tmp_path}/t.json"))
    with pytest.raises(UserError, match=r"data\.train: the file .*t\.json does not exist"):
        config.check_data_files(loaded, ["train"])
    with pytest.raises(UserError, match=r"key 'data\.val' is not set"):
        config.check_data_files(loaded, ["val"])
    (tmp_path / "t.json").write_text("[]")
    lost = load(tmp_path, overrides=[f"data.train={tmp_path}/t.json", f"data.image_root={tmp_path}/none"])
    with pytest.raises(UserError, match=r"data\.image_root: the folder .*none does not exist"):
        config.check_data_files(lost, ["train"])


def test_a_user_error_becomes_one_line_and_exit_code_2_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as end, config.exit_on_user_error():
        raise UserError("key 'x' is wrong; set it right")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: key 'x' is wrong; set it right\n"
    with pytest.raises(ZeroDivisionError), config.exit_on_user_error():
        1 / 0  # noqa: B018


def test_the_script_prints_the_resolved_config_or_one_value_for_shell_scripts(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL, encoding="utf-8")

    def script(*arguments):
        monkeypatch.setattr("sys.argv", ["config.py", "--config", str(path), *arguments])
        config.main()
        return capsys.readouterr().out

    assert yaml.safe_load(script("lora.r=3"))["lora"] == {"r": 3, "alpha": 32, "dropout": 0.05}
    assert script("--get", "output_dir") == "out\n"
    assert script("--get", "data.val") == "\n"
    with pytest.raises(UserError, match=r"no key 'data\.nothing'"):
        script("--get", "data.nothing")
