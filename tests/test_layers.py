"""The layers of pyproject.toml hold, and there are no hidden imports that would get around them."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeq.spec import LAYOUTS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "moeq"


def test_import_contracts() -> None:
    beside = Path(sys.executable).with_name("lint-imports")
    program = str(beside) if beside.exists() else shutil.which("lint-imports")
    if program is None:
        pytest.skip("import-linter is not installed")
    run = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_import_of_ours_is_deferred(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("moeq", "") for name in names), f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_functions_have_at_most_80_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name}, line {node.lineno}"


def test_no_branch_asks_for_a_layout() -> None:
    """What differs between layouts is in their packages; a branch elsewhere would have to be found for the next one."""
    branches = [str(path) for path in SOURCE.rglob("*.py") if "layout ==" in path.read_text(encoding="utf-8")]
    assert not branches


def test_every_layout_has_the_same_files() -> None:
    wanted = {"__init__", "shape", "stored", "reference", "cpu", "gpu", "known", "serving", "writer", "shown"}
    for name in LAYOUTS:
        assert wanted <= {path.stem for path in (SOURCE / "layouts" / name).glob("*.py")}


def test_writers_are_loaded_by_who_writes() -> None:
    """`part` hides an import from the linter, so it may name a writer in one place, which serving may not import."""
    callers = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if re.search(r"""part\([^)]*["']writer["']""", path.read_text(encoding="utf-8"))
    }
    assert callers == {"layouts/layer_writer.py"}
