"""Fails when the documentation and the code have drifted apart.

    python scripts/docs_drift.py            check everything, one line for each finding, exit status 1 if any
    python scripts/docs_drift.py --write    write docs/cli.md from the parser, then check everything

Checked are: docs/cli.md against the parser, every `moeq ...` command in a code block, examples with `>>>`,
the changelog's version, relative links and their anchors, named paths and tests, the JSON fields of docs/json.md, the
layers and walks of docs/design.md, the families of docs/families.md, and the length and order of the decisions.
"""

import argparse
import contextlib
import dataclasses
import doctest
import io
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grimp
import transformers

import moeq_cli
from moeq import cli
from moeq.artifacts import EvalResult
from moeq.layouts.selftest import Check
from moeq.stages.allocate import AllocateReport
from moeq.stages.bench import BenchReport
from moeq.stages.chat import ChatReport
from moeq.stages.compare import CompareReport
from moeq.stages.doctor import Device, DoctorReport, Route
from moeq.stages.export import ExportReport
from moeq.stages.generate import GenerateReport
from moeq.stages.imatrix import ImatrixReport
from moeq.stages.inspect import InspectReport
from moeq.stages.measure import MeasureReport
from moeq.stages.pareto import ParetoReport
from moeq.stages.plan import PlanReport
from moeq.stages.push import PushReport
from moeq.stages.quantize_report import QuantizeReport
from moeq.stages.repair import RepairReport
from moeq.stages.report import ReportReport
from moeq.stages.serve import ServeReport
from moeq.stages.verify import VerifyReport
from moeq.version import __version__
from moeq.writing.weight_families import Family

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
FAMILIES_PAGE = ROOT / "docs" / "families.md"
JSON_PAGE = ROOT / "docs" / "json.md"
DESIGN_PAGE = ROOT / "docs" / "design.md"
DECISIONS = ROOT / "docs" / "decisions"
SUITE = ROOT / "src" / "moeq" / "evals" / "suite.py"
MAX_DECISION_LINES = 30

REPORTS = {
    "plan": PlanReport,
    "inspect": InspectReport,
    "measure": MeasureReport,
    "allocate": AllocateReport,
    "pareto": ParetoReport,
    "quantize": QuantizeReport,
    "export": ExportReport,
    "imatrix": ImatrixReport,
    "push": PushReport,
    "repair": RepairReport,
    "eval": EvalResult,
    "generate": GenerateReport,
    "run": ChatReport,
    "serve": ServeReport,
    "report": ReportReport,
    "compare": CompareReport,
    "bench": BenchReport,
    "verify": VerifyReport,
    "doctor": DoctorReport,
    "Device": Device,
    "Route": Route,
    "Check": Check,
    "Family": Family,
}
"""Heading in docs/json.md -> the dataclass whose fields its table must name."""

EXPERTS_PROTOCOL = "use_experts_implementation"
"""What every family of transformers with stacked experts mentions in its modeling file."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"(?<![\w/.-])((?:src|tests|scripts|benchmarks|assets|docs)/[\w./-]*[\w/])")
NAMED_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
FIRST_CELL = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def pages() -> list[Path]:
    """All Markdown files of the project."""
    found = list(ROOT.glob("*.md"))
    for folder in ("docs", "assets", "benchmarks"):
        found += (ROOT / folder).rglob("*.md")
    return sorted(found)


def name_of(path: Path) -> str:
    """A path as the findings show it."""
    return path.relative_to(ROOT).as_posix()


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The sub-parsers by name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """(name with its value, help) of every argument but --help."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        names = ", ".join(action.option_strings) or action.dest.upper()
        takes_value = action.option_strings and action.nargs != 0
        value = f" {action.metavar or action.dest.upper()}" if takes_value else ""
        required = " (required)" if action.required and action.option_strings else ""
        yield f"{names}{value}", (action.help or "").replace("|", "\\|") + required


def cli_page() -> str:
    """docs/cli.md as the parser would have it."""
    parser = moeq_cli.build_parser()
    lines = [
        "# Command line",
        "",
        "<!-- Written by `python scripts/docs_drift.py --write`. Do not edit by hand. -->",
        "",
        "`moeq VERB ...`, or `python -m moeq.cli VERB ...`. Results go to stdout, progress and errors to stderr.",
        "Exit status: 0 done, 1 failed with a message, 2 wrong arguments, 130 interrupted.",
        "",
        "| option of `moeq` itself | meaning |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in options(parser)),
    ]
    for verb, sub in verbs(parser).items():
        lines += ["", f"## moeq {verb}", "", sub.description or "", "", "| argument | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in options(sub)]
    return "\n".join(lines) + "\n"


def check_cli_page() -> Iterator[str]:
    """docs/cli.md is what the parser says."""
    if not CLI_PAGE.exists() or CLI_PAGE.read_text(encoding="utf-8") != cli_page():
        yield f"{name_of(CLI_PAGE)} differs from the parser; run python scripts/docs_drift.py --write"


def check_commands() -> Iterator[str]:
    """Every `moeq ...` line in a shell block is accepted by the parser."""
    for page in pages():
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language not in ("bash", "sh", "console"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["moeq"] and (error := _parse_error(words[1:])):
                    yield f"{name_of(page)}: `{line.strip()}`: {error}"


def _parse_error(words: list[str]) -> str:
    silent = io.StringIO()
    try:
        with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(io.StringIO()):
            moeq_cli.build_parser().parse_args(words)
    except SystemExit as stop:
        return silent.getvalue().strip().rpartition("\n")[2] if stop.code else ""
    return ""


def check_examples() -> Iterator[str]:
    """Python blocks compile; those with `>>>` give what they say."""
    runner = doctest.DocTestRunner(verbose=False)
    for page in pages():
        names: dict[str, Any] = {}
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "python":
                continue
            if ">>>" not in block:
                try:
                    compile(block, name_of(page), "exec")
                except SyntaxError as error:
                    yield f"{name_of(page)}: a Python block does not compile: {error}"
                continue
            test = doctest.DocTestParser().get_doctest(block, names, name_of(page), None, None)
            said = io.StringIO()
            runner.run(test, out=said.write, clear_globs=False)
            names = test.globs
            if said.getvalue():
                yield f"{name_of(page)}: {said.getvalue().strip()}"


def check_version() -> Iterator[str]:
    """The newest heading of the changelog names the package's version."""
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if heading is None or heading[1] != __version__:
        yield f"CHANGELOG.md begins with {heading[1] if heading else 'no version'}, the package is {__version__}"


def check_links() -> Iterator[str]:
    """Relative links lead to files, and their anchors to headings."""
    for page in pages():
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for link in LINK.findall(text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = page if not path else page.parent / path
            if not target.exists():
                yield f"{name_of(page)}: the link {link} leads nowhere"
            elif anchor and anchor not in _anchors(target):
                yield f"{name_of(page)}: {link}: there is no such heading"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_paths() -> Iterator[str]:
    """Paths and tests of the repository that a page names exist."""
    for page in pages():
        text = LINK.sub("", page.read_text(encoding="utf-8"))  # links have their own check
        for path in sorted(set(NAMED_PATH.findall(text))):
            if not (ROOT / path).exists():
                yield f"{name_of(page)}: {path} does not exist"
        for path, test in sorted(set(NAMED_TEST.findall(text))):
            if f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8"):
                yield f"{name_of(page)}: {path} has no test {test}"


def check_families() -> Iterator[str]:
    """docs/families.md, once it is there, names every family of the installed transformers."""
    if not FAMILIES_PAGE.exists():
        return
    text = FAMILIES_PAGE.read_text(encoding="utf-8")
    models = Path(transformers.__file__).parent / "models"
    for source in sorted(models.glob("*/modeling_*.py")):
        family = source.parent.name
        if EXPERTS_PROTOCOL in source.read_text(encoding="utf-8") and not re.search(rf"(?<!\w){family}(?!\w)", text):
            yield f"{name_of(FAMILIES_PAGE)} does not name the family {family}"


def check_json() -> Iterator[str]:
    """docs/json.md names exactly the fields of the reports."""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", JSON_PAGE.read_text(encoding="utf-8"), re.M | re.S))
    envelope = set(cli.document("generate", {}))
    wanted = {"Every document": envelope}
    for heading, report in REPORTS.items():
        wanted[heading] = {field.name for field in dataclasses.fields(report)} - {"metrics"}
    for heading, fields in wanted.items():
        body, _, metrics = sections.get(heading, "").partition("\n### Metrics\n")
        named = set(FIRST_CELL.findall(body))
        for field in sorted(named ^ fields):
            yield f"{name_of(JSON_PAGE)}, {heading}: `{field}` is only in the {'page' if field in named else 'code'}"
        for metric in FIRST_CELL.findall(metrics):
            if f'"{metric}"' not in SUITE.read_text(encoding="utf-8"):
                yield f"{name_of(JSON_PAGE)}: {name_of(SUITE)} does not know the metric `{metric}`"


def check_layers() -> Iterator[str]:
    """docs/design.md shows the layers that the import linter enforces."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(each for each in project["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    wanted = [layer.replace("moeq.", "") for layer in contract["layers"]]
    text = DESIGN_PAGE.read_text(encoding="utf-8")
    shown = [block.splitlines() for language, block in FENCE.findall(text) if language == "layers"]
    drawn = [re.split(r"\s{2,}", line)[0] for block in shown for line in block]
    if drawn != wanted:
        yield f"{name_of(DESIGN_PAGE)}: the layers are not those of pyproject.toml: {', '.join(wanted)}"


def check_walks() -> Iterator[str]:
    """A walk of docs/design.md names each file once, and none imports the one before it: it goes down only."""
    graph = grimp.build_graph("moeq")
    blocks = [block for language, block in FENCE.findall(DESIGN_PAGE.read_text(encoding="utf-8")) if language == "walk"]
    if not blocks:
        yield f"{name_of(DESIGN_PAGE)} has no walk"
    for block in blocks:
        files = [line.split()[0] for line in block.splitlines()]
        for file in sorted({file for file in files if files.count(file) > 1 or not (ROOT / file).is_file()}):
            yield f"{name_of(DESIGN_PAGE)}: a walk names {file} twice, or it does not exist"
        modules = [file.removeprefix("src/").removesuffix(".py").replace("/", ".") for file in files]
        for before, after in itertools.pairwise(module for module in modules if module in graph.modules):
            if graph.find_shortest_chain(importer=after, imported=before):
                yield f"{name_of(DESIGN_PAGE)}: a walk goes back up: {after} imports {before}"


def check_decisions() -> Iterator[str]:
    """Decisions are short and numbered without gaps."""
    found = sorted(DECISIONS.glob("*.md"))
    for number, page in enumerate(found, start=1):
        if not page.name.startswith(f"{number:04}-"):
            yield f"{name_of(page)}: number {number:04} is due"
        lines = len(page.read_text(encoding="utf-8").splitlines())
        if lines > MAX_DECISION_LINES:
            yield f"{name_of(page)} has {lines} lines, {MAX_DECISION_LINES} are enough"


CHECKS: tuple[Callable[[], Iterator[str]], ...] = (
    check_cli_page,
    check_commands,
    check_examples,
    check_version,
    check_links,
    check_paths,
    check_families,
    check_json,
    check_layers,
    check_walks,
    check_decisions,
)


def main() -> int:
    """Print the findings; 1 if there are any."""
    parser = argparse.ArgumentParser(description="Check the documentation against the code.")
    parser.add_argument("--write", action="store_true", help="write docs/cli.md first")
    if parser.parse_args().write:
        CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(finding)
    print(f"{len(pages())} pages, {len(findings)} findings", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
