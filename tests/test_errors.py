import ast
import inspect
import re
from pathlib import Path

import pytest

from moeq import errors
from moeq.errors import MoeqError, OptionError, TensorError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MoeqError)]
SOURCE = Path(errors.__file__).parent


def test_message_names_place_and_fix() -> None:
    error = TensorError("the weights hold NaN", file=Path("a") / "b", tensor="x.y", fix="download it again.")
    assert str(error) == "the weights hold NaN (file a/b, tensor x.y). Fix: download it again."
    assert (error.file, error.tensor, error.option, error.fix) == ("a/b", "x.y", None, "download it again.")
    assert str(OptionError("bad", option="bits")) == "bad (option bits)."
    assert str(MoeqError("bad.")) == "bad."


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([| ]*)(?:[|`]- )?(\w+Error)\b", line)
        if match:
            depth = 0 if match.group(2) == "MoeqError" else 1 + len(match.group(1)) // 3
            path = [*path[:depth], match.group(2)]
            drawn[match.group(2)] = path[-2] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in ALL}


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_documented_and_raised_somewhere(kind: type[MoeqError]) -> None:
    assert kind.__doc__
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path.name != "errors.py")
    if kind is not MoeqError:
        assert re.search(rf"\b{kind.__name__}(\.of)?\(", text), "an error that nothing raises"


def test_the_library_neither_prints_nor_exits_nor_reads_the_environment() -> None:
    forbidden = {"print", "exit", "quit", "input", "breakpoint", "sys.exit", "os._exit", "os.environ", "os.getenv"}
    for path in SOURCE.rglob("*.py"):
        if path.name in ("cli.py", "cli_chat.py", "cli_progress.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = node.func if isinstance(node, ast.Call) else node
            if isinstance(named, ast.Attribute) or isinstance(node, ast.Call):
                assert ast.unparse(named) not in forbidden, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path.name}:{node.lineno}"


def test_files_and_functions_keep_to_their_limits() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
