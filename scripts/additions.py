"""Counts the files that an addition touches, on the latest example of each kind, and compares with docs/adding.md.

    python scripts/additions.py             differences from the page, exit status 1 if there are any
    python scripts/additions.py --write     write the page's list
    python scripts/additions.py --root DIR  count another checkout, to compare; the page is not looked at

A file counts if its code names the example; comments and docstrings do not count.
"""

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/adding.md"
BLOCK = re.compile(r"```additions\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The latest addition of a kind.

    Attributes:
        name: what was added.
        code: matches what names it in code.
        package: folder of its own, counted as one.
    """

    name: str
    code: str
    package: str | None = None


EXAMPLES = {
    "layout": Example(
        name="tiled",
        code=r'"tiled"|\bTiled\w+|\bTile(?:Form|Options)\b|layouts[./]tiled|tiled_experts|\btile_(?:forms|options|packing)\b'
        r"|(?:plan|recipe|draft|job|self)\.tiles\b|\btiling\b|(?:kernels|format)\.tiled|gpu_tiled|side_bytes",
        package="src/moeq/layouts/tiled",
    ),
    "quantizer": Example(
        name="vector", code=r'\bVector\b|quantizer == "vector"|gptq-mc, vector|"gptq", "vector"|"vector": 0'
    ),
    "level set": Example(
        name="vector", code=r'\bVECTORS\b|\bCodebooks\b|\.codebooks\b|levels="vector"|triton_vectors|codebook\.h'
    ),
    "cost": Example(name="weight-error", code=r"\bWeightError\b|weight-error|\bweight_error\b"),
    "method": Example(name="tileq", code=r'"tileq"'),
}


def code_of(path: Path) -> str:
    """A file without comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.sub(r"//[^\n]*", "", text)
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = (line for number, line in enumerate(text.splitlines(), start=1) if number not in said)
    return "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in lines)


def files_of(root: Path, example: Example) -> list[str]:
    """The files of a checkout that name an example."""
    pattern = re.compile(example.code)
    found = set()
    for path in (*root.glob("src/moeq/**/*.py"), *root.glob("csrc/*")):
        name = path.relative_to(root).as_posix()
        if example.package is not None and name.startswith(example.package + "/"):
            found.add(example.package + "/")
        elif pattern.search(code_of(path)):
            found.add(name)
    return sorted(found)


def listing(root: Path) -> str:
    """The block of the page."""
    lines = []
    for kind, example in EXAMPLES.items():
        found = files_of(root, example)
        lines += [f"{kind} {example.name}: {len(found)}", *(f"  {name}" for name in found)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print what differs; 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.root is not None:
        print(listing(options.root), end="")
        return 0
    page = ROOT / PAGE
    text, counted = page.read_text(encoding="utf-8"), listing(ROOT)
    if options.write:
        page.write_text(BLOCK.sub(lambda _: f"```additions\n{counted}```", text), encoding="utf-8")
        return 0
    shown = BLOCK.search(text)
    if shown is None or shown[1] != counted:
        print(
            f"{PAGE} does not list the files that additions touch; run python scripts/additions.py --write\n{counted}"
        )
        return 1
    print(f"{len(EXAMPLES)} kinds of additions", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
