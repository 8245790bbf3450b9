"""The page: what it is made of, and what a browser makes of it."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moeq
from moeq import codec
from moeq.artifacts import Plan
from moeq.costs.component_table import load_table
from moeq.errors import ArtifactError, OptionError
from moeq.recipe import Recipe
from moeq.report.facts import FACTS_NAME, ReportFacts
from moeq.report.page import page
from moeq.stages import compare, report
from moeq.stages import facts as facts_stage

CHROMIUM = shutil.which("chromium")
OPTIONS = {"nsamples": 16, "seqlen": 128, "device": "cpu"}


@pytest.fixture(scope="module")
def made(demo_dir: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind of plan."""
    root = tmp_path_factory.mktemp("report")
    costs = root / "costs.json"
    moeq.measure(demo_dir, bits=2.2, calibration=str(calibration_text), **OPTIONS).save(costs)
    options = {**OPTIONS, "calibration": str(calibration_text)}
    moeq.quantize(demo_dir, root / "auto", bits=2.2, costs=str(costs), **options)
    moeq.quantize(demo_dir, root / "alphaq", bits=2.6, method="alphaq", quantizer="rtn", **options)
    moeq.quantize(demo_dir, root / "bitsmoe", bits=3, method="bitsmoe", **options)
    return {name: root / name for name in ("auto", "alphaq", "bitsmoe")} | {"costs": costs}


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_what_is_kept_agrees_with_the_plan(made: dict[str, Path]) -> None:
    facts, plan = ReportFacts.load(made["auto"] / FACTS_NAME), Plan.load(made["auto"] / "moeq_plan.json")
    assert facts.plan_hash == plan.hash
    assert set(facts.quality) >= {"kl", "perplexity"}
    assert [trial.name for trial in facts.trials] == ["auto", "uniform"]
    table = load_table(made["costs"])
    sizes = [point.expert_bytes for point in facts.curve]
    costs = [point.objective for point in facts.curve]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    assert plan.objective is not None
    assert sum(facts.statistics["harm"]) == pytest.approx(plan.objective, rel=1e-3)
    # A point of the curve costs what its widths cost, by the table.
    column = {spec.bits: at for at, spec in enumerate(table.candidates)}
    middle = facts.curve[12]
    digits = "".join(middle.widths)
    assert middle.objective == pytest.approx(
        sum(row[column[int(d)]] for row, d in zip(table.costs, digits, strict=True)), rel=1e-3
    )
    # The plan itself lies on the curve, as nearly as a solver that takes shares and one that does not agree.
    below, above = (
        next(p for p in each if good(p))
        for each, good in (
            (reversed(facts.curve), lambda p: p.expert_bytes <= plan.expert_bytes),
            (facts.curve, lambda p: p.expert_bytes >= plan.expert_bytes),
        )
    )
    assert above.objective * 0.95 <= plan.objective <= below.objective * 1.05


def test_facts_of_every_kind(made: dict[str, Path]) -> None:
    for name in ("auto", "alphaq", "bitsmoe"):
        facts, plan = report.facts_of(made[name]), Plan.load(made[name] / "moeq_plan.json")
        assert (len(facts["layers"]), len(facts["tokens"])) == (4, 0 if name == "alphaq" else 4)
        assert all(len(row) == 16 for layer in facts["widths"] for row in layer.values())
        if plan.experts:
            assert facts["widths"][1]["up"][3] == plan.specs[plan.experts[1][3][1]].bits
            records = sum(sum(map(sum, layer.values())) for layer in facts["bytes"])
            assert 0.9 * plan.expert_bytes < records <= plan.expert_bytes
    assert len(report.facts_of(made["alphaq"])["statistics"]["alpha"]) == 192
    spectra = report.facts_of(made["bitsmoe"])["spectra"]
    assert len(spectra) == 12
    assert all(row[0] > row[-1] > 0 for row in spectra.values())
    assert len(report.facts_of(made["bitsmoe"])["curve"]) > 2


def test_bad_parts(made: dict[str, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(made["auto"], old)
    (old / FACTS_NAME).unlink()
    facts = report.facts_of(old)
    assert (facts["curve"], facts["quality_note"][:11]) == ([], "nothing was")
    shutil.copy2(made["alphaq"] / FACTS_NAME, old / FACTS_NAME)
    with pytest.raises(ArtifactError, match="belongs to another checkpoint"):
        report.facts_of(old)
    (old / FACTS_NAME).write_text('{"kind": "report-facts"')
    with pytest.raises(ArtifactError, match=FACTS_NAME):
        report.facts_of(old)
    with pytest.raises(OptionError, match="nothing to report"):
        report.run([], tmp_path / "report.html")
    (tmp_path / "other.json").write_text('{"verb": "eval"}')
    with pytest.raises(ArtifactError, match="no document of moeq compare"):
        report.run([made["auto"]], tmp_path / "report.html", compared=tmp_path / "other.json")
    assert not (tmp_path / "report.html").exists()


def test_names_cannot_break_the_page(made: dict[str, Path]) -> None:
    facts = report.facts_of(made["auto"]) | {"name": "</script><script>alert(1)</script>\u2028@DATA@ & @SCRIPT@"}
    text = page([facts], None, "window.library = '</script>';", "1")
    assert data_of(text)["checkpoints"][0]["name"] == facts["name"]
    assert text.count("<script") == 3
    assert "<title>&lt;/script&gt;" in text


@pytest.fixture(scope="module")
def written(made: dict[str, Path], text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    pair = [made["auto"], made["alphaq"]]
    measured = compare.run(
        pair, [text_dir / "eval.txt"], reference=moeq_source(text_dir), seqlen=128, max_tokens=1024, device="cpu"
    )
    document = {"verb": "compare", **codec.encode(measured)}
    (root / "compared.json").write_text(json.dumps(document))
    directories = [made["auto"], made["alphaq"], made["bitsmoe"], made["auto"]]
    done = report.run(directories, root / "report.html", compared=root / "compared.json")
    assert (done.bytes, len(done.checkpoints)) == ((root / "report.html").stat().st_size, 4)
    return root / "report.html"


def moeq_source(text_dir: Path) -> Path:
    return text_dir.parent / "demo-qwen3moe-4m"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (400, "dark")])
def test_in_a_browser(browser: Any, written: Path, width: int, scheme: str) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written.as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    assert tab.locator("#checkpoint option").all_inner_texts() == ["auto", "alphaq", "bitsmoe", "auto (2)"]
    _move_the_slider(tab)
    _show_everything(tab)
    tab.screenshot(path=written.with_suffix(".png"), full_page=True)
    assert trouble == []
    assert asked == [written.as_uri()]  # nothing from anywhere
    tab.close()


def _picture(tab: Any, place: str) -> bytes:
    picture: bytes = tab.locator(f"#{place} canvas").screenshot()
    return picture


def _move_the_slider(tab: Any) -> None:
    """Numbers and map follow, and are those of the data."""
    data = json.loads(tab.locator("#data").inner_text() or tab.evaluate("document.getElementById('data').textContent"))
    curve, weights = data["checkpoints"][0]["curve"], data["checkpoints"][0]["expert_parameters"]
    seen = []
    for at in (0, len(curve) - 1):
        tab.locator("#budget").evaluate(
            "(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')); }", at
        )
        tab.wait_for_timeout(300)
        shown = tab.locator("#budget-figures dd").first.inner_text()
        assert float(shown) == pytest.approx(8 * curve[at]["expert_bytes"] / weights, abs=6e-4)
        seen.append((_picture(tab, "budget-map"), _picture(tab, "curve")))
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


def _show_everything(tab: Any) -> None:
    """Every checkpoint, every measure; what a checkpoint does not have is not shown."""
    for at, (explorer, routing, spectra) in enumerate(
        [(True, True, False), (True, False, True), (True, True, True), (True, True, False)]
    ):
        tab.select_option("#checkpoint", str(at))
        tab.wait_for_timeout(600)
        visible = [tab.locator(f"#{name}").is_visible() for name in ("explorer", "routing", "spectra")]
        assert visible == [explorer, routing, spectra]
        pictures = set()
        for measure in tab.locator("#measure option").evaluate_all("all => all.map((each) => each.value)"):
            tab.select_option("#measure", measure)
            tab.wait_for_timeout(150)
            pictures.add(_picture(tab, "map"))
        assert len(pictures) == tab.locator("#measure option").count()


def test_a_budget_of_bytes_keeps_its_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    """Facts are what gives way, first the numbers of units, then the curve, then all."""
    whole, out = ReportFacts.load(made["auto"] / FACTS_NAME), tmp_path / "out"
    seen = []
    without = len(codec.canonical(replace(whole, statistics={}).to_dict())) + 1
    least = len(codec.canonical(replace(whole, statistics={}, curve=()).to_dict())) + 1
    for room in (100_000, without, without - 1, least - 1):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "weights").write_bytes(bytes(1000))
        facts_stage._save(out, whole, Recipe(method="uniform", size=str(1000 + room)))
        found = ReportFacts.load(out / FACTS_NAME) if (out / FACTS_NAME).is_file() else None
        seen.append(None if found is None else (bool(found.statistics), bool(found.curve), bool(found.quality)))
        assert sum(path.stat().st_size for path in out.iterdir()) <= 1000 + room
    assert seen == [(True, True, True), (False, True, True), (False, False, True), None]


def test_tuned_routers_have_no_old_figures(made: dict[str, Path], demo_dir: Path, tmp_path: Path) -> None:
    text = demo_dir.parent / "text" / "calibration.txt"
    moeq.repair(made["auto"], tmp_path / "tuned", calibration=text, nsamples=4, seqlen=64)
    before, after = (report.facts_of(each) for each in (made["auto"], tmp_path / "tuned"))
    assert before["quality"]
    assert (after["quality"], after["trials"], after["curve"]) == ({}, [], before["curve"])
    assert "run moeq eval" in after["quality_note"]
    assert after["options"]["tuned"].startswith("routers: task")
