"""Makes the texts that are bundled for calibration, src/moeq/texts, from the data folder beside the project.

    python scripts/bundled_texts.py [--data ../shared/data]

What is taken is chosen by what licences allow; LICENSES.md beside the texts names them.
"""

import argparse
import json
import random
import re
from pathlib import Path

WEB_BYTES = 600_000
BOOKS_BYTES = 220_000
DOCS_BYTES = 130_000
CODE_BYTES = 100_000
OUT = Path("src/moeq/texts")


def kind_of(text: str) -> str | None:
    """Where a document of the mixture comes from; None for what is not taken."""
    if text.startswith("Question: "):
        return "math"
    if text.startswith("---\ntitle: ") and sum(map(str.isascii, text)) > 0.98 * len(text):
        return "docs"
    if re.search(r"^# +(Licensed under the Apache License|SPDX-License-Identifier: Apache-2.0)", text, re.MULTILINE):
        return "code"
    if text.count("\r\n") > 20 and not re.search(r"http|copyright", text, re.IGNORECASE):
        return "books"
    return None


def main() -> None:
    """Write both texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    held_out = set((data / "c4" / "eval.txt").read_text(encoding="utf-8").splitlines())
    lines = (data / "c4" / "calibration.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and line not in held_out]
    random.Random(0).shuffle(lines)
    write("web", [{"domain": "web", "text": line} for line in cut(lines, WEB_BYTES)])
    rows = (data / "mixture" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for row in rows:
        text = json.loads(row)["text"]
        kind = kind_of(text)
        if kind is not None:
            found.setdefault(kind, []).append(text.replace("\r\n", "\n"))
    found["code"] += own_code()
    sizes = {"books": BOOKS_BYTES, "docs": DOCS_BYTES}
    taken = [
        {"domain": kind, "text": text}
        for kind in sorted(found)
        for text in cut(found[kind], sizes.get(kind, sum(map(len, found[kind]))))
    ]
    random.Random(0).shuffle(taken)
    write("mixture", taken)


def own_code() -> list[str]:
    """Files of this project, under its own licence."""
    files = sorted(Path("src/moeq").rglob("*.py")) + sorted(Path("csrc").glob("*.cpp"))
    chosen = [file.read_text(encoding="utf-8") for file in files]
    chosen = [text for text in chosen if 3000 < len(text) < 12_000]
    random.Random(0).shuffle(chosen)
    return cut(chosen, CODE_BYTES)


def cut(texts: list[str], size: int) -> list[str]:
    """The first texts, about `size` characters together."""
    kept, total = [], 0
    for text in texts:
        if total >= size:
            break
        kept.append(text)
        total += len(text)
    return kept


def write(name: str, rows: list[dict[str, str]]) -> None:
    """A text, and what is in it."""
    path = OUT / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        documents, size = counts.get(row["domain"], (0, 0))
        counts[row["domain"]] = documents + 1, size + len(row["text"])
    print(path, path.stat().st_size, counts)


if __name__ == "__main__":
    main()
