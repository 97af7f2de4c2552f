"""python compare.py results/exp1 results/exp2 [NAME=results/exp3_stage1+results/exp3_stage2 ...] --out comparison

The results of two or more experiments on the same test set -> compare.json, compare.md and compare.html, with honest
error bars, and the tables on the console. A + joins folders that hold parts of one test set, NAME= gives a name.
"""

import argparse
from pathlib import Path

from errors import UserError, exit_on_user_error
from files import refuse_unusable_folder, write_json, write_text
from report import page as compare_page
from report.comparison import compare
from report.results import check_same_test, read_results
from report.words import console_table, markdown, size_of_test, tables
from tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    usage, _, description = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="results folders, [NAME=]FOLDER[+FOLDER ...]")
    parser.add_argument("--out", required=True, type=Path, help="folder for compare.json, compare.md and compare.html")
    parser.add_argument("--image-root", type=Path, help="where the images lie (default: as the results say)")
    parser.add_argument("--pictures", type=int, default=200, help="at most so many images on the page (default: 200)")
    arguments = parser.parse_args(argv)
    refuse_unusable_folder(arguments.out, "--out")
    if arguments.pictures < 0:
        raise UserError(f"--pictures {arguments.pictures}: give a number of images, 0 or more")
    if len(arguments.results) < 2:
        raise UserError("nothing to compare: name at least two results folders")
    results = [read_results(argument) for argument in arguments.results]
    check_same_test(results)
    report = compare(results)

    unit, most = TASKS[report["task"]].UNIT, arguments.pictures
    page, images = compare_page.page(
        report, unit, size_of_test(report), tables(report), results, arguments.image_root, most
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "compare.json", report)
    write_text(arguments.out / "compare.md", markdown(report))
    write_text(arguments.out / "compare.html", page)

    for title, header, rows in tables(report):
        if title in ("Scores", "Pairs", "Accuracy % by stage"):  # the long tables are in the files
            print(f"\n{title}\n{console_table(header, rows)}")
    print("", *(pair["sentence"] for pair in report["pairs"]), "", *report["notes"], "", images, sep="\n")
    print(f"All tables: {arguments.out / 'compare.md'}; with images: {arguments.out / 'compare.html'}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
