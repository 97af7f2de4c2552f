"""python compare.py results/exp1 results/exp2 [NAME=results/exp2_seed1,results/exp2_seed2,... ...] --out comparison

The results of two or more experiments on the same test set -> compare.json, compare.md and compare.html, with honest
error bars, and the tables on the console. NAME= gives a name, a comma separates the runs of one experiment (its seeds),
a + joins folders that hold parts of one test set. Answers that are sentences are compared by token F1,
all others by being right or wrong.
"""

import argparse
from pathlib import Path

from errors import UserError, exit_on_user_error
from files import refuse_unusable_folder, write_json, write_text
from report import page as compare_page
from report.comparison import compare
from report.results import check_same_test, read_experiment
from report.words import console_table, markdown, size_of_test, statements, tables
from tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    usage, _, description = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", help="results folders, [NAME=]RUN[,RUN ...] with RUN = FOLDER[+FOLDER ...]"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for compare.json, compare.md and compare.html")
    parser.add_argument("--image-root", type=Path, help="where the images lie (default: as the results say)")
    parser.add_argument("--pictures", type=int, default=200, help="at most so many images on the page (default: 200)")
    parser.add_argument("--margin", type=float, metavar="POINTS", help="test whether pairs are equal within so much")
    parser.add_argument("--plan", type=float, metavar="POINTS", help="images and seeds that finding so much would need")
    arguments = parser.parse_args(argv)
    refuse_unusable_folder(arguments.out, "--out")
    if arguments.pictures < 0:
        raise UserError(f"--pictures {arguments.pictures}: give a number of images, 0 or more")
    for name in ("margin", "plan"):
        points = getattr(arguments, name)
        if points is not None and not 0 < points < 100:
            raise UserError(f"--{name} {points:g}: give percentage points, above 0 and below 100")
    if len(arguments.results) < 2:
        raise UserError("nothing to compare: name at least two results folders")
    experiments = [read_experiment(argument) for argument in arguments.results]
    check_same_test(experiments)
    margin, wanted = (None if points is None else points / 100 for points in (arguments.margin, arguments.plan))
    report = compare(experiments, margin, wanted)

    unit, most = TASKS[report["task"]].UNIT, arguments.pictures
    page, images = compare_page.page(
        report, unit, size_of_test(report), tables(report), experiments, arguments.image_root, most
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "compare.json", report)
    write_text(arguments.out / "compare.md", markdown(report))
    write_text(arguments.out / "compare.html", page)

    for title, header, rows in tables(report):
        short = title in ("Scores", "Pairs") or title.endswith("% by stage") or title.startswith("Plan")
        if short:  # the long tables are in the files
            print(f"\n{title}\n{console_table(header, rows)}")
    print("", *statements(report), "", *report["notes"], "", images, sep="\n")
    print(f"All tables: {arguments.out / 'compare.md'}; with images: {arguments.out / 'compare.html'}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
