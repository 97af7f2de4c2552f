"""Question -> stage of the clinical reading order, by keyword rules or by the scores of a language model.

Stage 1 initial assessment (quality, procedure, artefacts, text), 2 findings (abnormalities, instruments, landmarks,
their place, colour, number, size), 3 clinical context (diagnosis, treatment).

`stages.json` maps each distinct question to its stage: a plain number from the rules, an object with scores from a
model. What a person changed in it is kept on the next run.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from errors import UserError, first_names
from files import read_json

STAGES = {1: "initial assessment", 2: "findings", 3: "clinical context"}

# The first line that matches decides, so the order is part of the rules: "What type of procedure" is stage 1 although
# "What type of polyp" is stage 2, and a question of removal is one of treatment whatever it removes.
RULES = (
    (3, "treatment", r"\bremov|\bresect|\btreat|\btherap|\bmanage|\brecommend|\bfollow-?\s?up"),
    (
        3,
        "diagnosis",
        r"\bdiagnos|\bprognos|\bmalignan|\bbenign|\bcancer|\bsever(e|ity)\b|\bsignifican|\brisk\b|\bcause",
    ),
    (1, "procedure", r"\bprocedure|\bexamination\b|\bmodality"),
    (1, "artefacts", r"\bartefact|\bartifact|\bbox\b|\boverlay|\breflection|\bbubble"),
    (1, "text", r"\btext\b|\bcaption|\btimestamp|\bwritten\b"),
    (1, "quality", r"\b(easy|hard|difficult) to (detect|see|recogni[sz]e)|\bquality|\bblur|\bsharp|\bfocus|\bexposure"),
    (2, "place", r"^where\b|\blocat(ed|ion)|\bposition|\bquadrant"),
    (2, "colour", r"\bcolou?rs?\b"),
    (2, "number", r"^how many\b|\bnumber of\b|\bcount\b"),
    (2, "size", r"\bsize\b|\bhow (big|large|long|wide)\b|\bdiameter"),
    (2, "instruments", r"\binstru\w*|\btools?\b|\bforceps|\bsnare|\bneedle"),  # the set itself spells "instrumnets"
    (2, "landmarks", r"\blandmark|\banatom"),
    (2, "abnormalities", r"\babnormal|\bfindings?\b|\bpolyps?\b|\blesion|\bulcer|\bbleed"),
)

REVIEW_MARGIN = 1.0  # nats: the best stage is less than e = 2.7 times as likely as the next, so a human should look
PROMPT = """Questions about an endoscopic image are asked in the order of a clinical reading, in three stages.
Stage 1, initial assessment: image quality, type of procedure, artefacts, text in the image.
Stage 2, findings: abnormalities, instruments and anatomical landmarks, their place, colour, number, type and size.
Stage 3, clinical context: diagnosis, treatment, outcome.

Question: {question}

To which stage does the question belong? Answer with 1, 2 or 3 only."""


def stage_by_rules(question: str) -> int | None:
    """The stage of the first rule that matches, or None. Upper and lower case do not matter."""
    folded = " ".join(question.casefold().split())
    return next((stage for stage, _, pattern in RULES if re.search(pattern, folded)), None)


def load_stages(path: Path) -> dict:
    """Read `stages.json`: question -> 1, 2 or 3, or an object with the key "stage". A missing file is an empty one."""
    path = Path(path)
    if not path.exists():
        return {}
    entries = read_json(path, "correct it, or delete it to have it made anew")
    if not isinstance(entries, dict):
        raise UserError(f'{path}: must be an object of lines such as "Is there text?": 1')
    wrong = [question for question, entry in entries.items() if _stage(entry) not in STAGES]
    if wrong:
        raise UserError(f"{path}: the stage must be 1, 2 or 3 for: {first_names(wrong)}")
    return entries


def stages_text(entries: Mapping[str, object]) -> str:
    """`stages.json` as written: one question a line, by stage and then by question, easy to read, edit and diff."""
    ordered = sorted(entries.items(), key=lambda item: (_stage(item[1]), item[0]))
    lines = [f"  {_json(question)}: {_json(entry)}" for question, entry in ordered]
    return "{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n"


def assign_stages(questions: Iterable[str], stager: str, path: Path) -> tuple[dict, list[str]]:
    """Give every distinct question its stage: what a person wrote at `path`, else what `stager` says.

    `stager` is `rules`, or a causal language model (hub name or folder), loaded only when a question needs it.
    Returns: the content for `stages.json` (older questions of the file included) and the questions a person decided.
    Raises: `UserError` that lists every question the rules do not know.
    """
    entries = load_stages(path)
    questions = sorted(set(questions))
    by_hand = [
        question for question in questions if question in entries and decided_by_hand(question, entries[question])
    ]
    known = set(by_hand)
    if stager != "rules":  # its own earlier answers stand: same model, same question, same scores
        known |= {q for q in questions if isinstance(entries.get(q), dict) and entries[q].get("model") == stager}
    todo = [question for question in questions if question not in known]
    if stager == "rules":
        decided = {question: stage_by_rules(question) for question in todo}
        unmatched = [question for question in todo if decided[question] is None]
        if unmatched:
            listed = "; ".join(_json(question) for question in unmatched)
            raise UserError(
                f"no stage rule matches {len(unmatched)} of {len(questions)} questions: {listed}. "
                f"Write each with its stage into {path}, such as {{{_json(unmatched[0])}: 2}} "
                "(1 initial assessment, 2 findings, 3 clinical context), and run again"
            )
    else:
        decided = stages_by_model(todo, stager) if todo else {}
    return {**entries, **decided}, by_hand


def stage_numbers(entries: Mapping[str, object]) -> dict[str, int]:
    """Question -> stage number, whatever form the entries have."""
    return {question: _stage(entry) for question, entry in entries.items()}


def decided_by_hand(question: str, entry: object) -> bool:
    """Whether a person decided this entry: its stage is not its stager's, or a review was settled with `false`."""
    if isinstance(entry, dict) and isinstance(entry.get("scores"), dict) and entry["scores"]:
        best = max(entry["scores"], key=entry["scores"].get)
        return entry.get("review") is False or str(entry["stage"]) != best
    return _stage(entry) != stage_by_rules(question)


def stages_by_model(questions: list[str], model_name: str) -> dict[str, dict]:
    """Score the labels 1, 2, 3 after the prompt of each question with a causal language model.

    Returns: question -> {"stage", "margin", "scores" (label -> log-probability, nats), "model"}, and "review": true
    where the margin between the two best labels is below `REVIEW_MARGIN`. Nothing is sampled, and questions run one
    by one without padding, so a question's scores do not depend on the others.
    """
    from tqdm import tqdm

    tokenizer, model = _load(model_name)
    results = {}
    for question in tqdm(questions, desc="stages", disable=None):
        scores = label_scores(question, tokenizer, model)
        first, second = sorted(scores.values(), reverse=True)[:2]
        entry = {
            "stage": int(max(scores, key=scores.get)),  # equal scores: the earlier stage, and a margin of 0
            "margin": round(first - second, 4),
            "scores": {label: round(score, 4) for label, score in scores.items()},
            "model": model_name,
        }
        if first - second < REVIEW_MARGIN:
            entry["review"] = True
        results[question] = entry
    return results


def label_scores(question: str, tokenizer, model) -> dict[str, float]:
    """Label -> summed log-probability of its tokens after the prompt, in nats."""
    import torch

    prompt = PROMPT.format(question=question)
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        # enable_thinking: families that would think aloud first put the label somewhere else; others ignore the key
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        prompt_ids, separator = tokenizer.encode(text, add_special_tokens=False), ""
    else:
        prompt_ids, separator = tokenizer.encode(f"{prompt}\nAnswer:"), " "
    labels = {str(stage): tokenizer.encode(f"{separator}{stage}", add_special_tokens=False) for stage in STAGES}
    scores = {}
    for label, label_ids in labels.items():
        ids = torch.tensor([prompt_ids + label_ids], device=model.device)  # (1, prompt + label tokens)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]  # (label tokens, vocabulary)
        # float32: at bfloat16's resolution near labels would tie
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        scores[label] = log_probabilities.gather(1, ids[0, len(prompt_ids) :, None]).sum().item()
    if not all(math.isfinite(score) for score in scores.values()):
        raise UserError(
            f"the stager's scores for {_json(question)} are not finite: choose another model, or --stager rules"
        )
    return scores


def _load(model_name: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    except (OSError, ValueError) as error:  # absent, or not a causal language model
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--stager {model_name}: no causal language model of that name could be loaded ({reason})"
        ) from None
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _stage(entry: object) -> object:
    stage = entry.get("stage") if isinstance(entry, dict) else entry
    return None if isinstance(stage, bool) else stage


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
