"""Papers -> a folder of page images: their own, or their text drawn with Pillow and the font that comes with it."""

import re
import shutil
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from errors import UserError
from files import folder_beside

# In pixels. About A4, in sides that are multiples of 28; letters of 24 stay readable at a quarter of the page's pixels.
PAGE_SIZE = (1232, 1736)
MARGIN = 92
FONT_SIZE = 24
LINE_HEIGHT = 34
BOX = "\U0010ffff"  # no font has it, so that it is drawn as the box for what a font lacks
LINES_PER_PAGE = (PAGE_SIZE[1] - 2 * MARGIN) // LINE_HEIGHT


class Layout:
    """Texts -> the lines of their pages. `lacking` counts the characters met that the font cannot show."""

    def __init__(self):
        self.font = ImageFont.load_default(FONT_SIZE)
        self.lacking = 0
        self._widths: dict[str, float] = {}
        self._drawn_as: dict[str, str] = {}
        self._box = bytes(self.font.getmask(BOX))

    def pages_of(self, text: str) -> list[list[str]]:
        """The lines of each page. A blank line ends a paragraph, a single line end, as of a PDF's text, does not."""
        text = "".join(map(self._showable, unicodedata.normalize("NFC", text)))
        paragraphs = [self._wrap(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        lines = [line for paragraph in paragraphs for line in [*paragraph, ""]][:-1]
        starts = range(0, len(lines), LINES_PER_PAGE)
        return [lines[start : start + LINES_PER_PAGE] for start in starts]

    def _wrap(self, words: list[str]) -> list[str]:
        limit = PAGE_SIZE[0] - 2 * MARGIN
        space = self._width(" ")
        lines, line, used = [], [], 0.0
        for word in words:
            for piece in self._pieces(word, limit):
                width = self._width(piece)
                if line and used + space + width > limit:
                    lines.append(" ".join(line))
                    line, used = [], 0.0
                used += width + (space if line else 0.0)
                line.append(piece)
        return [*lines, " ".join(line)]

    def _pieces(self, word: str, limit: float) -> list[str]:
        """The word, or where it is wider than a line (a link, a formula), parts that are not."""
        pieces = []
        while self._width(word) > limit:
            end = 1
            while self._width(word[: end + 1]) <= limit:
                end += 1
            pieces.append(word[:end])
            word = word[end:]
        return [*pieces, word]

    def _width(self, text: str) -> float:
        if text not in self._widths:
            self._widths[text] = self.font.getlength(text)
        return self._widths[text]

    def _showable(self, character: str) -> str:
        """The character, or its plain form (ﬁ -> fi, é -> e) where the font has that alone; else a box, counted."""
        if character.isspace():
            return character
        if character not in self._drawn_as:
            parts = unicodedata.normalize("NFKD", character)
            plain = "".join(part for part in parts if not unicodedata.category(part).startswith(("M", "C")))
            if unicodedata.category(character) == "Pd":  # dashes of all lengths
                plain = "-"
            self._drawn_as[character] = next(filter(self._has, (character, plain)), BOX)
        self.lacking += self._drawn_as[character] == BOX
        return self._drawn_as[character]

    def _has(self, text: str) -> bool:
        return all(bytes(self.font.getmask(character)) != self._box for character in text)


def draw(lines: list[str]) -> Image.Image:
    """One page, greyscale, of `PAGE_SIZE`."""
    page = Image.new("L", PAGE_SIZE, 255)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(FONT_SIZE)
    for row, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + row * LINE_HEIGHT), line, fill=0, font=font)
    return page


def lay_out(papers: list[dict], out: Path, report_title: str, counts: dict[str, int]) -> dict[str, Path | list[str]]:
    """Set each paper's `images` (from its `source_pages`, else from its `text`), relative to `out`.

    report_title: how the report.md of an `out` that may be overwritten begins. `counts` gathers what was found.
    Returns: page file -> the file to copy, or the lines to draw; nothing is written yet.
    Raises: `UserError`.
    """
    folder, old_report = out / "pages", out / "report.md"
    is_ours = old_report.is_file() and old_report.read_text(encoding="utf-8", errors="replace").startswith(report_title)
    if folder.exists() and not is_ours:
        raise UserError(f"{folder} exists and is none of this command's; give another --out, or move it away")
    layout = Layout()
    files, given = {}, 0
    for paper in papers:
        own = paper["source_pages"]
        if any(path.resolve().is_relative_to(folder.resolve()) for path in own):
            raise UserError(f"paper {paper['id']}: its page images lie in {folder}, to be replaced; give another --out")
        given += bool(own)
        contents = own or layout.pages_of(paper["text"])
        stem = re.sub(r"[^\w.-]", "_", paper["id"])
        suffixes = [path.suffix for path in own] or [".png"] * len(contents)
        paper["images"] = [f"pages/{stem}-{number}{suffix}" for number, suffix in enumerate(suffixes, 1)]
        for name, content in zip(paper["images"], contents, strict=True):
            if name in files:
                raise UserError(f"paper {paper['id']}: its page would be {name}, as another paper's; change its id")
            files[name] = content
    counts["papers shown by their own page images"] = given
    counts["papers drawn as pages"] = len(papers) - given
    counts["pages"] = len(files)
    counts["pages of the longest paper"] = max(len(paper["images"]) for paper in papers)
    counts["characters that the pages' font lacks, drawn as a box"] = layout.lacking
    return files


def write(out: Path, files: dict[str, Path | list[str]]) -> None:
    """Fill a new `pages` folder with what `lay_out` returned and put it in the place of the old one."""
    if not files:
        return
    with folder_beside(out / "pages") as folder:
        for name, content in files.items():
            target = folder / Path(name).name
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                draw(content).save(target)
