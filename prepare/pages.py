"""Papers -> a folder of page images: their own, or their text drawn with Pillow and the font that comes with it."""

import math
import re
import shutil
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from errors import UserError
from files import folder_beside

# In pixels. About A4, in sides that are multiples of 28; letters of 24 stay readable at a quarter of the page's pixels.
PAGE_SIZE = (1232, 1736)
SIDE_UNIT = 28
MARGIN = 92
FONT_SIZE = 24
LINE_HEIGHT = 34
OVERSIZE = 3  # text is drawn so much too large: at its own size, letters sit on whole pixels and words at uneven gaps
BOX = "\U0010ffff"  # no font has it, so that it is drawn as the box for what a font lacks
LINES_PER_PAGE = (PAGE_SIZE[1] - 2 * MARGIN) // LINE_HEIGHT
# What stands for characters that the font lacks, and which characters LaTeX's commands are; others become their names.
PLAIN = {"×": "x", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->", "∞": "infinity", "−": "-", "∈": "in"}
LATEX = {
    **{"times": "×", "cdot": "·", "pm": "±", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "neq": "≠", "approx": "≈"},
    **{"sim": "~", "to": "→", "rightarrow": "→", "infty": "∞", "ell": "l", "ldots": "...", "dots": "...", "in": "∈"},
}


class Layout:
    """Texts -> the lines of their pages. `lacking` counts the characters met that the font cannot show."""

    def __init__(self):
        self.font = ImageFont.load_default(OVERSIZE * FONT_SIZE)
        self.lacking = 0
        self._widths: dict[str, float] = {}
        self._drawn_as: dict[str, str] = {}
        self._box = bytes(self.font.getmask(BOX))

    def pages_of(self, text: str) -> list[list[str]]:
        """The lines of each page. A blank line ends a paragraph, a single line end, as of a PDF's text, does not."""
        text = "".join(map(self._showable, unicodedata.normalize("NFC", without_latex(text))))
        paragraphs = [self._wrap(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        pages = [[]]
        for paragraph in paragraphs:
            gap = [""] if pages[-1] else []
            for line in [*gap, *paragraph]:
                if len(pages[-1]) == LINES_PER_PAGE:
                    pages.append([])
                if line or pages[-1]:
                    pages[-1].append(line)
        return [lines if lines[-1] else lines[:-1] for lines in pages if lines]

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
            self._widths[text] = self.font.getlength(text) / OVERSIZE
        return self._widths[text]

    def _showable(self, character: str) -> str:
        """The character, or its plain form (ﬁ -> fi, é -> e, β -> beta) where the font has that alone; else a box,
        counted."""
        if character.isspace():
            return character
        if character not in self._drawn_as:
            parts = unicodedata.normalize("NFKD", character)
            plain = "".join(part for part in parts if not unicodedata.category(part).startswith(("M", "C")))
            if unicodedata.category(character) == "Pd":  # dashes of all lengths
                plain = "-"
            elif unicodedata.name(character, "").startswith("GREEK"):
                plain = unicodedata.name(character).split(" WITH ")[0].split()[-1].lower()
                plain = plain.capitalize() if character.isupper() else plain
            plain = PLAIN.get(character, plain)
            self._drawn_as[character] = next(filter(self._has, (character, plain)), BOX)
        self.lacking += self._drawn_as[character] == BOX
        return self._drawn_as[character]

    def _has(self, text: str) -> bool:
        return all(bytes(self.font.getmask(character)) != self._box for character in text)


def without_latex(text: str) -> str:
    r"""LaTeX as a reader would type it: `\textit{so}` -> so, `$O(n^{2}\log n)$` -> O(n^2 log n), `$\beta$-VAE` ->
    beta-VAE. A dollar that begins no formula (costs $5) stays."""
    # As in Pandoc, no space stands inside a formula's dollars, and no digit behind them; or its signs tell. In
    # prices ($5 per item_x, at 10\%, and $6) they do not: an underscore beside spaces, and a backslash before a sign.
    text = re.sub(
        r"(?<!\\)(\$\$?)((?! )[^$]*[^$ ](?=\1(?!\d))|(?! )[^$ ](?=\1(?!\d))"
        r"|[^$]*(?:\\[^%&#_$]|\^)[^$]*|[^$\s]*_[^$\s]*)(?<!\\)\1",
        _formula,
        text,
    )
    return re.sub(r"\\([%&_$#{} ])", r"\1", _without_commands(text))


def _formula(match: re.Match) -> str:
    text = _without_commands(match[2].strip())
    text = re.sub(r"([\^_])\{(\w+)\}", r"\1\2", text)
    text = re.sub(r"([\^_])\{([^{}]*)\}", r"\1(\2)", text)
    return re.sub(r"(?<!\\)[{}]", "", text)


def _without_commands(text: str) -> str:
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"(\w?)\\([a-zA-Z]+)(?![a-zA-Z]|\s*\{)(?=(.?))", _symbol, text, flags=re.DOTALL)
    before = None
    while before != text:  # a command with an argument is a font, an accent or a link: the argument stays
        before, text = text, re.sub(r"\\[a-zA-Z]+\s*\{([^{}]*)\}", r"\1", text)
    return text


def _symbol(match: re.Match) -> str:
    before, name, after = match.groups()
    shown = LATEX.get(name, name.removeprefix("var"))
    if not shown.isalpha() or len(shown) == 1:
        return before + shown
    return before + " " * bool(before) + shown + " " * (after.isalnum() or after == "\\")


def draw(lines: list[str]) -> Image.Image:
    """One page, greyscale: as wide as `PAGE_SIZE`, and as high as its lines need, so that no half of it is empty."""
    needed = 2 * MARGIN + len(lines) * LINE_HEIGHT
    height = min(PAGE_SIZE[1], math.ceil(needed / SIDE_UNIT) * SIDE_UNIT)
    page = Image.new("L", (OVERSIZE * PAGE_SIZE[0], OVERSIZE * height), 255)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(OVERSIZE * FONT_SIZE)
    for row, line in enumerate(lines):
        x = OVERSIZE * MARGIN
        for word in line.split(" "):  # as `_wrap` measured them: the font would kern a word with the space behind it
            pen.text((x, OVERSIZE * (MARGIN + row * LINE_HEIGHT)), word, fill=0, font=font)
            x += font.getlength(word) + font.getlength(" ")
    return page.reduce(OVERSIZE)


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
