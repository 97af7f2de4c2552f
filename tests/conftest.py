"""What several test files share: one thread, no network, the tiny models, and the way to the real material."""

import os
import signal
from pathlib import Path

# Before torch is imported anywhere; subprocesses inherit it. Two ranks on two cores are fastest with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise the tokenizer warns in every forked loader worker
os.environ["HF_HUB_OFFLINE"] = "1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent


def shared_data(relative):
    """Path of real material in ../shared/data beside the repo; skips the test where it is absent, fails it in CI."""
    path = REPO_ROOT.parent / "shared" / "data" / relative
    if not path.exists():
        reason = f"real material ../shared/data/{relative} is not here"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and CI must have it")
        pytest.skip(reason)
    return path


class TinyModels(dict):
    """family -> folder of its tiny model, built at the first look-up and then shared: read it, never write into it."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, family):
        self[family] = self.build(family)
        return self[family]

    def build(self, family, **options):
        """A folder for these options of `write_tiny_model`, built once per session."""
        from toy.tiny_model import write_tiny_model

        name = "-".join([family, *(f"{key}={value}" for key, value in sorted(options.items()))])
        folder = self.root / name.replace("/", "_")
        return folder if folder.exists() else write_tiny_model(folder, family, **options)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Dict family -> folder (see TinyModels); `tiny_models.build(family, **options)` for other sizes."""
    import torch

    torch.set_num_threads(1)
    return TinyModels(tmp_path_factory.mktemp("tiny_models"))


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """train.main installs handlers; the test session keeps its own."""
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
