"""python prepare_data.py kvasir --source RAW_DIR --out DATA_DIR

Raw sources -> train.json, val.json, test.json and a report of everything that was counted. Nothing is written unless
all of it can be, but a list of the rows that cannot.
"""

import argparse
import importlib
from pathlib import Path

from errors import exit_on_user_error
from files import refuse_unusable_folder

KVASIR = """python prepare_data.py kvasir --source RAW_DIR --out DATA_DIR

Kvasir-VQA (images/<img_id>.jpg and metadata.csv, or the parquet files of its hub) -> train.json, val.json, test.json,
stages.json (question -> stage, yours to edit) and report.md. Identical files stay on one side of the split.

The rules (prepare/stager.py) put the questions into stages so; edit stages.json and run again to change one:
  1 initial assessment  What type of procedure is the image taken from? Is there a green/black box artefact? Is there
                        text? Is this finding easy to detect?
  2 findings            Does this image contain any finding? Are there any abnormalities, anatomical landmarks,
                        instruments? How many findings, polyps, instruments? What color is the abnormality, the
                        landmark? What size, what type is the polyp? Where is the abnormality, landmark, instrument?
  3 clinical context    Have all polyps been removed?"""


KVASIR_X1 = """python prepare_data.py kvasir-x1 --source PARQUET_DIR --images KVASIR_DIR --out DATA_DIR

Kvasir-VQA-x1 (its parquet files, or SimulaMet/Kvasir-VQA-x1) -> train.json, val.json, test.json, report.md, and a
config to start from. Its images are those of Kvasir-VQA, found by id in KVASIR_DIR/images. Levels of complexity become
stages; answers are free text. The default split is one of images. The published one (--split official) is reported to
share images between train and test: they are counted, the config then says data.shared_images: allowed, without which
training refuses, and every result counts the test samples on images of train."""


CLICK = """python prepare_data.py click --source FILE.jsonl --out DATA_DIR

Screenshots with instructions -> train.json, val.json, test.json and report.md. One JSON object a line, or a JSON list:
  {"image": "a.png", "instruction": "tap on the card", "point": [x, y], "bbox": [x0, y0, x1, y1]}
The instruction may be called "instruction", "problem" or "question"; the point "point" or "click_position_px"; the box
"bbox" or "box". A point or a box is enough; of a box alone, the centre is clicked. A file in ShareGPT form ("messages"
or "conversations") has its points or boxes in the assistant's text: every user turn with its answer is one click.
ScreenSpot, -v2 and -Pro are read as published ("img_filename"; a folder's files together); the kind of target, platform
and category are kept and scored apart. With --split 0/0/100 a set is only for testing.
Coordinates count from the upper left corner of the upright image. Other keys are kept. Identical files stay on one
side of the split."""


VQA = """python prepare_data.py vqa --source FILE_OR_FOLDER --out DATA_DIR

Own questions and answers -> train.json, val.json, test.json, report.md, and a config to start from. One sample each:
  JSON list or .jsonl   {"image": "a.jpg", "question": "...", "answer": "polyp; ulcer"}
  .csv                  columns named image, question, answer; also id, stage, candidates ("a; b"), any others are kept
  LLaVA                 {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>..."}, ...]}
  ShareGPT, OpenAI      {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>..."}, ...]}
A folder's data files are read together. Images are relative to --image-root. Identical files stay on one side of the
split, and so do images that one sample shows together. A conversation of one question becomes question and answer;
longer ones stay as they are. Candidates and multi-label are decided from the training answers, as for Kvasir-VQA;
those that a sample has stay. With --split 0/0/100 the set is only for testing."""


PAPERS = """python prepare_data.py papers --source FILE.jsonl --out DATA_DIR

Papers with decisions -> train.json, val.json, test.json and report.md. One JSON object a line:
  {"id", "title", "abstract" and/or "full_text", "keywords": [...], "ratings": [6, 8, 5], "decision": "Accept (Poster)",
   "images": ["page1.png", ...]}
Any accept is label 1, a reject 0; withdrawn and undecided papers are dropped. Each split gets as many of the one as of
the other. Ratings and decision are kept beside the text, never in it; phrases that tell the decision ("Published as a
conference paper at ...") are cut out. Papers with the same title or text stay on one side of the split, which is the
same with and without --pages."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    def family(name: str, description: str, source: str, split: str, of_what: str) -> argparse.ArgumentParser:
        command, _, text = description.partition("\n")
        parser = families.add_parser(
            name,
            help=text.strip().partition("->")[0].strip(),
            usage=f"{command} [options]",
            description=text.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        metavar = command.split()[command.split().index("--source") + 1]
        parser.add_argument("--source", required=True, metavar=metavar, help=source)
        parser.add_argument("--out", required=True, metavar="DATA_DIR", help="folder to write; it is made if need be")
        parser.add_argument("--seed", type=int, default=42, help="of the split and the order (default: %(default)s)")
        parser.add_argument("--split", default=split, metavar="TRAIN/VAL/TEST",
                            help=f"per cent of the {of_what} (default: %(default)s)")  # fmt: skip
        return parser

    def add_answers(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--answers", choices=("auto", "short", "sentences"), default="auto",
                            help="what the answers are: for sentences evaluate.py adds token F1, BLEU, ROUGE, METEOR "
                                 "(auto: sentences where more than half have five words or more)")  # fmt: skip

    def add_common(parser: argparse.ArgumentParser, config: str) -> None:
        parser.add_argument("--drop-refused", action="store_true",
                            help="go on without rows that cannot be used; refused_rows.jsonl lists them")  # fmt: skip
        parser.add_argument("--config", metavar="C.yaml",
                            help=f"the config to write; one that is there stays (default: {config})")  # fmt: skip
        parser.add_argument("--model-name", default="Qwen/Qwen3-VL-8B-Instruct", metavar="MODEL",
                            help="of the config: a hub name or a folder (default: %(default)s)")  # fmt: skip

    command, _, text = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        usage=f"{command} [options]",
        description=text.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families = parser.add_subparsers(metavar="FAMILY", dest="family", required=True)

    source = "folder with images/ and metadata.csv, folder of parquet files, or hub name (SimulaMet-HOST/Kvasir-VQA)"
    kvasir = family("kvasir", KVASIR, source, "70/15/15", "images")
    kvasir.add_argument("--order", choices=("stages", "random"), default="stages",
                        help="of train.json: stage 1, 2, 3 with the questions of an image side by side, or all "
                             "questions shuffled (default: %(default)s)")  # fmt: skip
    kvasir.add_argument("--stager", default="rules", metavar="rules|MODEL",
                        help="who gives each question its stage: keyword rules, or a causal language model by hub "
                             "name or folder (default: %(default)s)")  # fmt: skip

    source = "a parquet file, a folder of them, or hub name"
    x1 = family("kvasir-x1", KVASIR_X1, source, "70/15/15", "images; or: official")
    x1.add_argument("--images", required=True, metavar="KVASIR_DIR",
                    help="folder of Kvasir-VQA, with images/<img_id>.jpg")  # fmt: skip
    add_answers(x1)
    add_common(x1, config="configs/NAME.yaml, NAME as in DATA_DIR")

    source = "the file to read (.jsonl or .json), or a folder of them"
    click = family("click", CLICK, source, "70/15/15", "clicks, whole images only")
    click.add_argument("--image-root", metavar="DIR",
                       help="folder that the image paths are relative to (default: the source file's)")  # fmt: skip
    click.add_argument("--coordinates", choices=("pixels", "relative1000", "relative1"), default="pixels",
                       help="what the numbers are: pixels of the original image, or shares of its width and height "
                            "in thousandths or from 0 to 1; never guessed (default: %(default)s)")  # fmt: skip
    click.add_argument("--boxes", choices=("xyxy", "xywh"),
                       help="what a box of four numbers is: two corners, or a corner with width and height (default: "
                            "xyxy; ScreenSpot files need it said: -v2 is xywh, -Pro xyxy)")  # fmt: skip
    add_common(click, config="none is written")

    source = "a .json, .jsonl or .csv file, or a folder of them"
    vqa = family("vqa", VQA, source, "70/15/15", "images")
    vqa.add_argument("--image-root", metavar="DIR",
                     help="folder that the image paths are relative to (default: the source's)")  # fmt: skip
    vqa.add_argument("--keep-together", metavar="NEAR_IDENTICAL.json", nargs="+", default=[],
                     help="pairs of nearly identical images to keep on one side of the split, as `train.py --check` "
                          "and this command write them; take out of the file the pairs that differ")  # fmt: skip
    add_answers(vqa)
    add_common(vqa, config="configs/NAME.yaml, NAME as in DATA_DIR")

    papers = family("papers", PAPERS, source, "85/5/10", "papers")
    papers.add_argument("--train-agreeing", action="store_true",
                        help="keep in train only papers whose mean rating is on their decision's side of the boundary "
                             "that report.md states; val and test stay as they are")  # fmt: skip
    papers.add_argument("--pages", action="store_true", dest="as_pages",
                        help="samples show page images instead of text: the source's own, relative to its folder, or "
                             "else the text drawn on pages; all of them under DATA_DIR/pages")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = vars(parse_arguments(arguments))
    refuse_unusable_folder(Path(options["out"]), "--out")
    # Imported here, so that --help and the other families do not wait for it.
    importlib.import_module(f"prepare.{options.pop('family').replace('-', '_')}").prepare(**options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
