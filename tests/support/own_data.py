"""Thirty drawn images with questions, in every form that users have their data in."""

import csv
import json
from pathlib import Path

from support.tiny_runs import write_images

FORMS = ("json", "jsonl", "csv", "llava", "sharegpt")
QUESTIONS = ("What color is it?", "Is it large?", "What is beside it?")
ANSWERS = (("red", "green", "blue"), ("yes", "no"), ("a ball", "a ball; a box", "a box"))


def write_own_data(folder: Path, form: str, images: int = 30) -> Path:
    """The images and a file about them with three questions each; returns what --source takes."""
    names = [f"images/{number:02d}.png" for number in range(images)]
    write_images(folder / "images", [name.removeprefix("images/") for name in names])
    rows = [
        {"image": name, "question": question, "answer": answers[(number + number // 3) % len(answers)]}
        for number, name in enumerate(names)
        for question, answers in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    if form == "csv":
        with open(folder / "data.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder
    if form == "llava":
        rows = [{"id": str(n), "image": row["image"], "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]}
                for n, row in enumerate(rows)]  # fmt: skip
    if form == "sharegpt":
        rows = [{"images": [row["image"]], "messages": [
                {"role": "user", "content": f"<image>{row['question']}"},
                {"role": "assistant", "content": row["answer"]}]} for row in rows]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    path = folder / ("data.jsonl" if form == "jsonl" else "data.json")
    path.write_text("\n".join(lines) + "\n" if form == "jsonl" else "[" + ",\n".join(lines) + "]")
    return path
