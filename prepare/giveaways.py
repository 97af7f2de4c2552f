"""What would tell a paper's decision without its content: stamps of conference styles, and the form it comes in."""

import re

# Conference styles print the decision over the text: the camera-ready version says "Published" or names the volume, the
# other one "Under review", "Preliminary work". A model would learn to read that and nothing else.
_YEAR = r"(\s*[(,]?\s*(\d{2}/)?(\d{4}|'\d{2})\)?\.?)"
_HOW = r"((accepted|submitted|to\s+appear|appearing|published)\s+(at|to|in|by)\s+(the\s+)?)?"
_NTH = r"\d+\s*(st|nd|rd|th)"
_REST = r"[^.\n]{0,80}\.?"  # place and pages after a conference's name
STAMP = re.compile(
    "|".join(
        (
            rf"(published|under\s+review|accepted|to\s+appear)\s+as\s+an?\s+\w+(\s+\w+)?\s+paper\s+at\s+[\w.]+{_YEAR}?",
            rf"(accepted|to\s+appear|published)\s+(at|to|in|by)\s+(the\s+)?\w+{_YEAR}",
            rf"{_HOW}{_NTH}\s+conference\s+on\s+neural\s+information\s+processing\s+systems{_REST}",
            rf"{_HOW}(proceedings\s+of\s+the\s+)?{_NTH}\s+international\s+conference\s+on\s+machine\s+learning{_REST}",
            rf"preliminary\s+work\.\s+under\s+review\s+by{_REST}",
            rf"(published\s+in|under\s+review\s+as\s+(a\s+)?submission\s+to)\s+(transactions\s+on\s+machine\s+learning"
            rf"\s+research|tmlr){_YEAR}?",
            r"reviewed\s+on\s+openreview:?\s*(https?://\S+)?",
            r"pmlr\s+\d+(,\s*\d{4})?\.?",
            r"copyright\s+\d{4}\s+by\s+the\s+author\(s\)\.?",
            r"do\s+not\s+distribute\.?",
            r"(anonymous\s+authors?(\(s\))?\s+)?paper\s+under\s+double-blind\s+review",
            r"anonymous\s+author(s|\(s\))",
        )
    ),
    re.IGNORECASE,
)
MOST_UNEVEN = 0.1  # share of accepts less that of rejects


def without_stamps(text: str) -> str:
    return STAMP.sub("", text).strip()


def uneven_forms(papers: list[dict], forms: dict[str, str]) -> list[str]:
    """A line for each form that comes with one label much more often than with the other.

    forms: words for a form -> the key of a paper that says whether it has it."""
    lines = []
    for words, key in forms.items():
        rejects, accepts = (
            sum(bool(p[key]) for p in papers if p["label"] == label) / max(1, sum(p["label"] == label for p in papers))
            for label in (0, 1)
        )
        if abs(accepts - rejects) > MOST_UNEVEN:
            lines.append(
                f"WARNING: {accepts:.0%} of the accepts but {rejects:.0%} of the rejects come with {words}: a model "
                "can read the label off that alone. Give all papers the same form"
            )
    return lines
