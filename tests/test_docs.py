"""What README and docs/ tell a reader to type is typed here, page by page and in order, in an empty directory.

Examples with `>>>` are run by scripts/docs_drift.py. What takes minutes or a network is left to `make nightly`.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fresh
import serving

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    *sorted(f"docs/howto/{path.name}" for path in (ROOT / "docs" / "howto").glob("*.md")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "make test": "this",
    "make check": "continuous integration",
    "make format": "changes files",
    "make nightly": "minutes",
    "make test-vllm": "gigabytes, minutes",
    "make sanitize": "minutes; `make nightly`",
    "make aarch64": "a minute, and a cross compiler; `make nightly`",
    "make docs": "minutes",
    "make wheels": "minutes",
    "make demo": "minutes; `make nightly`",
    "pip install torch": "minutes; `make nightly`",
    "pip install .": "minutes; `make nightly`",
    "pip install '.[vllm]'": "gigabytes; the format is read by transformers in tests/stages/test_export.py",
    "pip install '.[serve]'": "installed with the rest",
    "pip install '.[ray]'": "installed with the rest",
    "pip install '.[report]'": "installed with the rest",
    "pip install '.[eval]'": "installed with the rest",
}
"""Commands that are not run here, and why."""
SLOW = (
    "docs/guide.md",
    "docs/methods.md",
    "docs/scale.md",
    "docs/howto/compare.md",
    "docs/howto/fit.md",
    "docs/tutorial.md",
)
"""Pages that wait for `make nightly`."""
VERB = "import os, sys; os.chdir(sys.argv.pop(1)); from moeq.cli import main; sys.exit(main(sys.argv[1:]))"
SNIPPET = (
    "import os, sys; os.chdir(sys.argv[1]); exec(compile(sys.argv[2], 'snippet', 'exec'), {'__name__': '__main__'})"
)


def blocks(page: str, *languages: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the code of a page."""
    for language, block in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        if language in languages:
            yield language, block


def commands(block: str) -> Iterator[list[str]]:
    """The words of every line of a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.nightly if page in SLOW else ()) for page in PAGES]
)
def test_what_a_page_says_works(page: str, tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    with contextlib.ExitStack() as servers:
        _typed(page, tmp_path, servers)


def _typed(page: str, tmp_path: Path, servers: contextlib.ExitStack) -> None:
    for language, block in blocks(page, "bash", "sh", "console", "python"):
        if language == "python":
            if ">>>" not in block:
                done = fresh.run(SNIPPET, str(tmp_path), block)
                assert done.returncode == 0, f"{block}\n{done.stderr}"
            continue
        for words in commands(block):
            if words[:2] == ["moeq", "serve"]:  # it goes on for the rest of the page
                place = (tmp_path / words[2], *words[3:])
                servers.enter_context(serving.started(*place)).stop_later(servers)
            elif words[0] == "moeq":
                done = fresh.run(VERB, str(tmp_path), *words[1:])
                assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
                assert done.stdout or words[1] == "run", words  # nobody says anything there
            else:
                assert shlex.join(words) in ELSEWHERE, f"{page}: nobody runs {shlex.join(words)}"


def clone(tmp_path: Path) -> Path:
    """The project as somebody else gets it: what git knows, with what is not committed yet."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    copy = tmp_path / "clone"
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_make_demo(tmp_path: Path) -> None:
    copy = clone(tmp_path)
    done = subprocess.run(["make", "demo"], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "original" in (copy / "demo-output" / "table.md").read_text(encoding="utf-8")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_installation(tmp_path: Path) -> None:
    copy, venv = clone(tmp_path), tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "-q", "-c", "constraints.txt"]
    subprocess.run([*pip, "torch"], cwd=copy, check=True)
    subprocess.run([*pip, "."], cwd=copy, check=True)
    words = [str(venv / "bin" / "moeq"), "plan", str(ROOT / "assets" / "demo-qwen3moe-4m"), "--bits", "3"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "expert" in done.stdout


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_sanitizers(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "scripts/sanitize.sh"], cwd=clone(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_kernels_on_arm(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "scripts/aarch64.sh", "5"], cwd=clone(tmp_path), capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "aarch64: ok\n"
