"""A merged model folder -> its model card, and its upload to the hub: exactly its own files, no path of this machine.

The token comes from the environment (HF_TOKEN) or the hub's own login. It is never an argument, because everybody on a
cluster can read those, and it is kept out of every message.
"""

import fnmatch
import re
from dataclasses import replace
from pathlib import Path

from config import Config, to_yaml
from errors import UserError
from files import read_json
from merged.reference import FILE as REFERENCE_FILE
from run_folder import MERGED_CONFIG_FILE
from samples import read_samples
from tasks import task_of
from templates import SYSTEM_PROMPTS

# What a merged model consists of. Anything else in the folder is not uploaded, and stops the upload.
ALLOWED = (
    "README.md",
    MERGED_CONFIG_FILE,
    REFERENCE_FILE,
    "coordinates.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
LOADING = """```python
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
image_processor = AutoImageProcessor.from_pretrained("{name}")
```"""


# ------------------------------------------------------------------------------------------------------------ the card


def public_config(config: Config) -> Config:
    """The config without folders of this machine: of every path, only the last part stays."""

    def last(path: str | None) -> str | None:
        return path and Path(path).name

    files = {name: last(getattr(config.data, name)) for name in ("train", "val", "test")}
    data = replace(config.data, **files, image_root=".")
    return replace(
        config,
        model_name=config.model_name if is_hub_name(config.model_name) else last(config.model_name),
        data=data,
        output_dir=last(config.output_dir),
        results_dir=last(config.results_dir),
        init_adapter=last(config.init_adapter),
        resume="auto",
    )


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def data_counts(config: Config) -> dict[str, int | None]:
    """Samples of each named split; None where the file is not at hand (any more)."""
    counts = {}
    for name in ("train", "val", "test"):
        path = getattr(config.data, name)
        if path:
            try:
                most = config.max_samples if name == "train" else None
                counts[name] = sum(1 for _ in read_samples(path, most))
            except UserError:
                counts[name] = None
    return counts


def scores_of(config: Config, folder: Path) -> dict:
    """The run's test scores; empty where there are none, or where they are of other weights than those in `folder`."""
    path = Path(config.results_dir) / "predict_results.json"
    try:
        scores = read_json(path, "evaluate.py makes it")
    except UserError as error:
        print(f"The model card goes without scores: {error}")
        return {}
    scored = Path(scores.get("checkpoint") or "")
    if scored.absolute() != folder.absolute():
        print(f"The scores in {path} are of {scored}, not of {folder}: the model card goes without them")
        return {}
    return scores


def model_card(name: str, config: Config, counts: dict, scores: dict, check: str) -> str:
    """README.md of a merged model: what it is, how to use it, data, scores, config and how the merge was checked."""
    base = public_config(config).model_name
    head = [f"base_model: {base}"] if is_hub_name(config.model_name) else []
    head += ["library_name: transformers", "pipeline_tag: image-text-to-text", f"tags: [{config.task}]"]
    shown = f"letterboxed to {config.image_size}×{config.image_size}" if config.resize == "letterbox" else "native"
    prompt = SYSTEM_PROMPTS.get(config.template)
    how = (
        f"LoRA of rank {config.lora.r} (alpha {config.lora.alpha}), merged into the base weights"
        if config.finetuning == "lora"
        else "full fine-tuning"
    )
    quantized = ", trained on a 4-bit (NF4) base and merged into the full-precision one"
    sections = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {name}",
        f"{config.experiment}: {base} fine-tuned for task `{config.task}`; {how}"
        f"{quantized if config.quantization == 'nf4' else ''}.",
        "## Use",
        LOADING.format(name=name),
        f"Images were {shown}, the template was `{config.template}`, answers are greedy (`do_sample=False`, which "
        "`generation_config.json` says; elsewhere, set the temperature to 0). The chat template was told "
        "`enable_thinking=False`, which one without thoughts ignores.",
        *([f"System prompt:\n\n```\n{prompt}\n```"] if prompt else []),
        *(["Answers are points `[x, y]`; `coordinates.json` says in which units."] if task_of(config).POINTS else []),
        "## Data",
        _rows(("split", "samples"), {k: "not at hand" if v is None else f"{v:,}" for k, v in counts.items()}),
        "## Scores on the test split",
        _rows(("score", "value (95 % interval)"), _score_texts(scores)) if scores else "Not evaluated yet.",
        "## Check of the merge",
        check,
        f"`{REFERENCE_FILE}` holds prompts and greedy answers of this folder. `predict.py --adapter-path FOLDER "
        "--verify URL` asks a server of it the same, and says where prompt, pixels or answers differ.",
        "## Config",
        f"```yaml\n{to_yaml(public_config(config)).strip()}\n```",
        "The licences of the base model and of the training data apply.",
    ]
    return "\n\n".join(sections) + "\n"


def _score_texts(scores: dict) -> dict[str, str]:
    texts = {}
    for key, value in scores.items():
        if f"{key}_ci" in scores and value is not None:
            interval = scores[f"{key}_ci"]
            low, high = ("open" if end is None else f"{end:.4g}" for end in interval or (None, None))
            texts[key] = f"{value:.4g}" + (f" ({low} to {high})" if interval else "")
    return texts | {"samples": f"{scores['predict_samples']:,}"}


def _rows(head: tuple[str, str], rows: dict[str, str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


# ---------------------------------------------------------------------------------------------------------- the upload


def check_access(repo: str) -> None:
    """Whether there is a token that the hub knows, before hours of work. Raises: `UserError` with the cure."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise UserError("--push needs the name of a repository: USER/REPO")
    if not get_token():
        raise UserError("--push needs a token: set HF_TOKEN in the environment, or log in once with: hf auth login")
    with _without_token("the hub does not accept the token; make one with write access at its settings page"):
        HfApi().whoami()


def files_of(folder: Path) -> list[str]:
    """The names of a merged model's files. Raises: `UserError` naming a file that does not belong to one."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    strangers = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)]
    if strangers:
        raise UserError(
            f"{folder} holds {', '.join(strangers[:10])}, which is no part of a merged model; nothing is pushed "
            "before it is moved elsewhere"
        )
    needed = {"README.md", "config.json", "tokenizer_config.json", MERGED_CONFIG_FILE}
    if missing := sorted(needed - set(names)):
        raise UserError(f"{folder} is no merged model: {', '.join(missing)} missing; merge with --adapter-path first")
    return names


def push(folder: Path, repo: str) -> str:
    """Upload the folder's files to a repository of the hub, which is made (private) where it does not exist; returns
    its address. Raises: `UserError`, without the token."""
    from huggingface_hub import HfApi

    names = files_of(folder)
    again = f"the merged model is intact in {folder}; push it again with: python merge.py --out {folder} --push {repo}"
    with _without_token(again):
        api = HfApi()
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message="Merged model, checked by merge.py"
        )
    return str(address)


class _without_token:
    """Turns whatever the hub's client raises into a `UserError` in which the token cannot appear."""

    def __init__(self, cure: str):
        self.cure = cure

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        from huggingface_hub import get_token

        if error is None or not isinstance(error, Exception):
            return
        reason = " ".join(str(error).split()) or kind.__name__
        token = get_token()
        raise UserError(f"{reason.replace(token, '***') if token else reason}; {self.cure}") from None
