"""One output folder, one run: who owns it, which checkpoint it goes on from, and which old ones go."""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

from checkpoint import ADAPTER_CONFIG, STATE_FILE, TrainerState, check_base, read_state, whats_wrong
from config import FREE_ON_RESUME, Config, build_config, flatten, load_config, to_dict
from errors import UserError


class OutputLock:
    """Holds an output folder for one run. The lock is the kernel's (POSIX, so that forked data workers do not hold it),
    and ends with its owner, however that ends; the file's text only says who it is.

    Raises: `UserError` naming the owner."""

    def __init__(self, output_dir):
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(output_dir) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
        except OSError as error:
            raise UserError(
                f"output_dir {output_dir} cannot be written to ({error.strerror}: {error.filename}); choose another, "
                "or put right what stands there"
            ) from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            raise UserError(
                f"output_dir {output_dir} is in use by {owner}; wait for it to end or choose another output_dir"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"No lock on {output_dir} ({error.strerror}): two jobs in it would not notice each other", flush=True)
        job = os.environ.get("SLURM_JOB_ID")
        self._file.truncate(0)
        self._file.write(
            f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}, "
            f"since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        self._file.flush()


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def checkpoints(output_dir) -> list[Path]:
    """Checkpoint folders in order of their step, complete or not."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=step_of)


def newest_complete(output_dir) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for each newer one that is not complete."""
    ignored = []
    for folder in reversed(checkpoints(output_dir)):
        wrong = whats_wrong(folder, content=True)
        if wrong is None:
            return folder, ignored
        ignored.append(f"Ignoring {folder}: {wrong}")
    return None, ignored


CONFIG_FILE, MERGED_CONFIG_FILE = "config.yaml", "finetune_config.yaml"


def config_of(folder: Path, overrides=()) -> Config:
    """The config of the run that made a folder: an output folder, one of its checkpoints, or a merged model.

    A folder that holds a whole model is its own `model_name`. Raises: `UserError` where no config is found."""
    candidates = [folder / MERGED_CONFIG_FILE, folder / CONFIG_FILE]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        candidates.append(folder.absolute().parent / CONFIG_FILE)
    path = next((path for path in candidates if path.is_file()), None)
    if path:
        config = load_config(path, overrides)
    elif whats_wrong(folder) is None:  # a checkpoint that was copied elsewhere
        config = build_config(read_state(folder).config, str(folder / STATE_FILE), overrides)
    else:
        raise UserError(
            f"{folder} holds no {CONFIG_FILE} of a run; say which config it was trained with: --config FILE"
        )
    return with_own_model(config, folder)


def with_own_model(config: Config, folder: Path) -> Config:
    """The config with `folder` as its model, where the folder holds a whole one."""
    whole = (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()
    return replace(config, model_name=str(folder)) if whole else config


def find_resume(config: Config, global_batch: int, train_data: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None for a fresh run, and lines for the log: about each unusable one, and more.

    A path in `resume` counts only while the run has no complete checkpoint of its own: a run that was started from it
    and stopped goes on from where it stopped.
    Raises: `UserError` where the run could not be the same experiment, or would mix with another in the folder."""
    existing = checkpoints(config.output_dir)
    if config.resume == "never" and existing:
        raise UserError(
            f"output_dir {config.output_dir} already holds {existing[-1].name} and resume is 'never'; "
            "set resume: auto to go on, or choose a new output_dir"
        )
    folder, notes = newest_complete(config.output_dir)
    if config.resume not in ("auto", "never"):
        if folder:
            notes.append(f"resume: {config.resume} no longer counts: {folder} is this run's own")
        else:
            folder = Path(config.resume)
            if wrong := whats_wrong(folder, content=True):
                raise UserError(f"resume: {folder} is no complete checkpoint ({wrong}); give another, or resume: auto")
    if folder:
        check_same_mathematics(read_state(folder), config, global_batch, train_data, folder)
        notes += filter(None, [check_base(folder, config.model_name)])
    return folder, notes


def check_same_mathematics(
    state: TrainerState, config: Config, global_batch: int, train_data: str, folder: Path
) -> None:
    """Raises: `UserError` naming the keys in which a resumed run would not be the same experiment."""
    old, new = flatten(state.config), flatten(to_dict(config))
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in FREE_ON_RESUME
    ]
    if state.global_batch != global_batch:
        changed.append(f"train_bs × grad_accum × GPUs: {state.global_batch} -> {global_batch}")
    if state.train_data != train_data:
        changed.append(f"the samples in data.train ({config.data.train}) or max_samples")
    if changed:
        raise UserError(
            f"{folder} was trained with another config ({'; '.join(changed)}); "
            "set these back, or choose a new output_dir for the new experiment"
        )


def rotate(output_dir, keep: int, best_step: int | None, saved_step: int) -> threading.Thread:
    """Delete the checkpoints before the newest `keep` complete ones, never the best or the one that was saved last. In
    the background: deleting a large folder on a network disk takes seconds that the next step need not wait for."""
    # A later one than the last that was saved cannot be used, or the run would have gone on from there.
    past = [folder for folder in checkpoints(output_dir) if step_of(folder) <= saved_step]
    kept = [folder for folder in past if whats_wrong(folder) is None][-keep:]
    doomed = past[: past.index(kept[0])] if kept else []
    doomed = [folder for folder in doomed if step_of(folder) not in (best_step, saved_step)]
    # left by a run that was killed while it deleted, or saved
    doomed += [p for pattern in (".deleted-*", ".checkpoint-*.tmp") for p in Path(output_dir).glob(pattern)]

    def delete():
        for folder in doomed:
            # Renamed first, so that a kill while deleting cannot leave half a checkpoint under a good name.
            hidden = folder if folder.name.startswith(".") else folder.with_name(f".deleted-{folder.name}")
            with contextlib.suppress(OSError):
                folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    thread = threading.Thread(target=delete)
    thread.start()
    atexit.register(thread.join)  # `distributed.end_process` waits for nothing else
    return thread
