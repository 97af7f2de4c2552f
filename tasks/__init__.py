"""What a task is, one file each: how a sample becomes a prompt and a target, how its rows are scored, what is drawn.

A fourth task is one more module here, a line in `TASKS`, and its name in `config.Config.task`. Its names:

    TEMPLATES        the values of `template` that it knows
    HAS_HEAD         True: it answers with a class, from a head beside the language model; False: in words
    POINTS           True: its answers are points on the image
    BEST_IS_RESULT   True: a run's result are the weights of its best evaluation; False: those of its end
    RECORD_FILE      what is kept beside its weights under this name: see `record`; None: nothing

    prompt(sample, encoder, images, placement) -> (chat messages, class label or None)
    row(sample, encoder, output) -> a line of generated_predictions.jsonl; output: (text, finished) of an answer,
        (logits, cut_tokens) of a class
    output_of(prediction, config) -> the output for `row` of a prediction made elsewhere (evaluate.py --predictions)
    score(rows, config) -> the scores of predict_results.json; whole images, or documents, are resampled
    selection_score(values) -> what chooses the best of several evaluations on val: the greater list
    record(family, config) -> the content of RECORD_FILE; weights are never read under another one
    draw(rows, config, folder), which writes images beside the scores
    COUNTED          what a run's log counts: questions, clicks, papers
    UNIT, CLUSTER    what is scored, and what is resampled as a whole (image, or the unit itself)
    ROW_KEYS         what a row of predictions must have; TEST_KEYS: what makes two rows of one id the same test
    correct(row), compared_scores(rows), parts(row) -> {kind: name of the part that the row belongs to}, for compare.py
    verdict(row), what experiments can disagree on; asked_and_gold(row), said(row), the texts of compare.py's page
    sample_to_predict(images, prompt, candidates, config) -> a sample for predict.py
    describe(row) -> the lines that predict.py prints

None of them imports torch.
"""

from pathlib import Path

from config import Config
from errors import UserError
from family import Family
from files import read_json
from tasks import click, cls, vqa
from templates import CONVERSATION_TEMPLATE

TASKS = {"vqa": vqa, "click": click, "cls": cls}


def task_of(config: Config):
    """The module of a config's task."""
    return TASKS[config.task]


def counted(config: Config) -> str:
    """What a run's log counts: the task's own, or whole conversations."""
    return "conversations" if config.template == CONVERSATION_TEMPLATE else task_of(config).COUNTED


def records(family: Family, config: Config) -> dict[str, dict]:
    """File name -> content of what is kept beside the weights of a run."""
    task = task_of(config)
    return {task.RECORD_FILE: task.record(family, config)} if task.RECORD_FILE else {}


def check_record(folder, family: Family, config: Config) -> None:
    """Raises: `UserError` where the weights in `folder` were trained under another record than this run's.
    folder None: there are none."""
    for name, now in records(family, config).items():
        path = Path(folder or "") / name
        if folder is None or not path.is_file():
            continue
        trained = read_json(path, "restore it from the run's other checkpoints")
        differing = [key for key in trained.keys() | now.keys() if trained.get(key) != now.get(key)]
        if differing:
            told = "; ".join(f"{key} {trained.get(key)!r}, here {now.get(key)!r}" for key in sorted(differing))
            raise UserError(
                f"{folder} was trained with {told}; its answers would be misread, so use the settings it had"
            )
