"""Scores of answers that are sentences: token F1, BLEU, ROUGE and METEOR, by the libraries that papers report.

sacrebleu (corpus BLEU), rouge-score (ROUGE F-measures, no stemming) and nltk (METEOR) are extras; without them only
token F1 is scored, and that is said. nltk's METEOR matches words, stems and, through WordNet, synonyms. WordNet is a
download of its own (python -m nltk.downloader wordnet); without it words and stems are matched. The scores say which.
"""

import functools
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from report.metrics import _with_intervals, image_key
from report.resampling import bootstrap, cluster_numbers

SENTENCE_WORDS = 5
PHRASE_WORDS = 3  # that end with a full stop
LIBRARIES = ("sacrebleu", "rouge_score", "nltk")
INSTALL = "pip install -r requirements-extra.txt"
BLEU_ORDER = 4
KEPT = "free_form_scores"  # a key of a row of predictions
NAMES = ["predict_token_f1", "predict_rouge1", "predict_rouge2", "predict_rougeL", "predict_meteor", "predict_bleu"]
KEPT_NAMES = NAMES[1:-1]  # token F1 is quick, and BLEU no mean of its rows


def is_sentence(answer: str) -> bool:
    """Five words and more (in one item, where semicolons join several), or three with a full stop behind them."""
    words = max(len(item.split()) for item in str(answer).split(";"))
    return words >= SENTENCE_WORDS or (words >= PHRASE_WORDS and str(answer).rstrip().endswith((".", "!", "?")))


def are_sentences(answers: Iterable[str]) -> bool:
    """Whether more than half of a set's answers are: then exact match would score next to nothing."""
    found = [is_sentence(answer) for answer in answers]
    return sum(found) > len(found) / 2


def is_free_form(rows: Sequence[dict]) -> bool:
    """Whether rows of predictions are scored as sentences: as their samples say, or else as their answers are."""
    stated = [row["free_form"] for row in rows if "free_form" in row]
    return any(stated) if stated else are_sentences(row["answer"] for row in rows if not row.get("candidates"))


def missing_libraries() -> list[str]:
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def token_f1(prediction: str, answer: str) -> float:
    """2|P∩G|/(|P|+|G|) over the bags of words, without case, punctuation and a, an, the: the F1 of SQuAD
    (Rajpurkar et al. 2016, arXiv 1606.05250); two empty texts agree."""
    predicted, gold = Counter(_words(prediction)), Counter(_words(answer))
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * (predicted & gold).total() / (predicted.total() + gold.total())


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.casefold().translate(_PUNCTUATION)).split()


def score_free_form(rows: Sequence[dict], overrule: bool | None = None) -> dict:
    """What `metrics.score_vqa` is joined by where answers are sentences; else nothing. Intervals by bootstrap over
    images. overrule: whether they are, where the caller knows better than `is_free_form`.

    predict_token_f1, predict_rouge1, _rouge2, _rougeL, predict_meteor: means over the rows, 0 to 1; None where the
        library is missing, which `free_form_missing` names. predict_bleu: of the corpus, 0 to 1.
    free_form: True. meteor_matches: what METEOR took for a match. The rows get ROUGE and METEOR under `KEPT`, so that
    a comparison need not compute them again.
    """
    if not (is_free_form(rows) if overrule is None else overrule):
        return {}
    means, bleu = columns(rows)
    for number, row in enumerate(rows):
        row[KEPT] = {name: float(means[name][number]) for name in KEPT_NAMES if np.isfinite(means[name][number])}
        if "predict_meteor" in row[KEPT]:
            row[KEPT]["synonyms"] = has_synonyms()
    values = np.stack(list(means.values()), axis=1)  # (samples, scores)

    def statistic(weights: np.ndarray) -> np.ndarray:
        corpus = bleu(weights) if bleu else np.full(len(weights), np.nan)
        return np.column_stack([weights @ values / weights.sum(axis=1, keepdims=True), corpus])

    found, intervals = bootstrap(statistic, cluster_numbers([image_key(row) for row in rows]))
    scores = _with_intervals(NAMES, found, intervals) | {"free_form": True}
    missing = missing_libraries()
    if "rouge_score" in missing and scores["predict_rougeL"] is not None:  # kept by an earlier evaluation
        missing.remove("rouge_score")
    if missing:
        scores["free_form_missing"] = missing
    if "nltk" not in missing:
        scores["meteor_matches"] = meteor_matches()
    return scores


def columns(rows: Sequence[dict]) -> tuple[dict[str, np.ndarray], Callable[[np.ndarray], np.ndarray] | None]:
    """Score -> its value of each row (samples,), and for BLEU, which is no mean of its rows, a statistic for bootstrap:
    weights (resamples, samples) -> (resamples,). None where its library is missing."""
    pairs = [(str(row["prediction"]), str(row["answer"])) for row in rows]
    nothing = np.full(len(rows), np.nan)
    found = {name: nothing for name in NAMES[:-1]}
    found["predict_token_f1"] = np.array([token_f1(*pair) for pair in pairs])
    missing = missing_libraries()
    kept = [row.get(KEPT, {}) for row in rows]
    if all("predict_rougeL" in scores for scores in kept):
        found |= {name: np.array([scores[name] for scores in kept]) for name in KEPT_NAMES[:-1]}
    elif "rouge_score" not in missing:
        scores = [_rouge().score(answer, prediction) for prediction, answer in pairs]
        for kind in ("rouge1", "rouge2", "rougeL"):
            found[f"predict_{kind}"] = np.array([score[kind].fmeasure for score in scores])
    if "nltk" not in missing and all(scores.get("synonyms") == has_synonyms() for scores in kept):
        found["predict_meteor"] = np.array([scores["predict_meteor"] for scores in kept])
    elif "nltk" not in missing:
        found["predict_meteor"] = np.array([meteor(*pair) for pair in pairs])
    return found, None if "sacrebleu" in missing else _bleu_statistic(pairs)


@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


class _NoSynonyms:
    """In WordNet's place where it is not installed."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


@functools.cache
def _wordnet():
    import nltk

    try:
        nltk.data.find("corpora/wordnet.zip")
    except LookupError:
        try:
            nltk.data.find("corpora/wordnet")
        except LookupError:
            return _NoSynonyms()
    from nltk.corpus import wordnet

    wordnet.ensure_loaded()
    return wordnet


def has_synonyms() -> bool:
    return not isinstance(_wordnet(), _NoSynonyms)


def meteor_matches() -> str:
    return "words, stems and synonyms (WordNet)" if has_synonyms() else "words and stems"


def meteor(prediction: str, answer: str) -> float:
    """nltk's METEOR of one pair, 0 to 1."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    words = NLTKWordTokenizer().tokenize  # word_tokenize would want a download, to tell sentences apart
    return float(single_meteor_score(words(answer), words(prediction), wordnet=_wordnet()))


def _bleu_statistic(pairs: Sequence[tuple[str, str]]) -> Callable[[np.ndarray], np.ndarray]:
    """Corpus BLEU, 0 to 1, from sums over the rows of their n-gram counts and lengths."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)  # silences a warning about single sentences; the counts are the same
    scores = [bleu.sentence_score(prediction, [answer]) for prediction, answer in pairs]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        found = []
        for sums in (weights @ counts).round().astype(int):
            correct, total, (length, wanted) = sums[:BLEU_ORDER], sums[BLEU_ORDER:-2], sums[-2:]
            score = BLEU.compute_bleu(list(correct), list(total), int(length), int(wanted), smooth_method="exp")
            found.append(score.score / 100)
        return np.array(found)

    return statistic
