"""The rows of benchmarks/evidence.py: names, their options, and which of them are measured where."""

from typing import Any

Row = dict[str, Any]

BITS = 2.125
BUDGETS = (1.6, 2.5, 3.125)
SEEDS = (0, 1, 2)
TEXT_COSTS = ("fisher", "output-error", "spectral-energy")
"""Costs that depend on the calibration text."""


def alphaq(unit: str = "matrix", **options: Any) -> Row:
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return {"method": "alphaq", "unit": unit, "cost_options": text or None}


def gemq(options: str | None = None, **more: Any) -> Row:
    """Matrix units, scalar levels, no tuning of routers, costs of all tokens in one sum, unless told otherwise."""
    plain = "texts=pooled,samples=0,tokens=0"
    every = f"{plain},{options}" if options else plain
    return {"method": "gemq", "unit": "matrix", "router": "none", "quantizer": "gptq", "cost_options": every, **more}


def spectral(options: str | None = None, **more: Any) -> Row:
    return {"method": "bitsmoe", "cost_options": f"texts=pooled,{options}" if options else "texts=pooled", **more}


def tiled(options: str = "", rank: int | str = 4, **more: Any) -> Row:
    full = "down=true,rotation=none" + (f",{options}" if options else "")
    return {"method": "tileq", "rank": str(rank), "tile_options": full, **more}


MAIN: dict[str, Row] = {
    "uniform": {"method": "uniform"},
    "pmq": {"method": "pmq"},
    "alphaq": alphaq(),
    "gemq, expert units": gemq(unit="expert"),
    "gemq, matrix units": gemq(),
    "gemq, expert units, router tuning": gemq(unit="expert", router="task"),
    "bitsmoe": spectral(),
    "tileq": {"method": "tileq"},
}
"""Every method, at all budgets."""

QUANTIZERS: dict[str, Row] = {
    f"uniform, {name}": {"method": "uniform", "quantizer": name} for name in ("rtn", "hqq", "gptq-mc", "vector")
} | {"uniform, rtn, symmetric levels": {"method": "uniform", "quantizer": "rtn", "levels": "sym"}}

ALPHAQ: dict[str, Row] = {
    **{f"alphaq, gamma {gamma}": alphaq(gamma=gamma) for gamma in (0, 1, 3, 30)},
    "alphaq, expert units": alphaq(unit="expert"),
    "alphaq, alpha shuffled": alphaq(alpha="shuffled"),
    "alphaq, alpha reversed": alphaq(alpha="reversed"),
    "alphaq, measured noise": alphaq(noise="weights"),
    "alphaq, gamma 1, measured noise": alphaq(gamma=1, noise="weights"),
    "alphaq, gamma 1, measured noise, alpha reversed": alphaq(gamma=1, noise="weights", alpha="reversed"),
}

GEMQ: dict[str, Row] = {
    "gemq, matrix units, no shares": gemq(shares="none"),
    "gemq, matrix units, 1 to 4 bits, no shares": gemq(shares="none", candidates="1,2,3,4"),
    "gemq, matrix units, budget per layer": gemq(scope="layer"),
    "gemq, matrix units, router tuning": gemq(router="task"),
    "gemq, matrix units, router tuning by kl": gemq(router="kl"),
    "gemq, matrix units, progressive": gemq(progressive="3,2.5"),
    "gemq, matrix units, full form": gemq("form=full"),
    "gemq, matrix units, gptq perturbation": gemq("perturb=gptq"),
    "gemq, expert units, no shares": gemq(unit="expert", shares="none"),
    "gemq as it comes, costs measured with trellises": {"method": "gemq", "cost_options": "perturb=trellis"},
    "gemq as in the paper": gemq("perturb=paper,floor=0", unit="expert", router="task"),
    "uniform, router tuning": {"method": "uniform", "router": "task"},
    "uniform, router tuning by kl": {"method": "uniform", "router": "kl"},
    "pmq, matrix units": {"method": "pmq", "unit": "matrix"},
    "output error, matrix units, global": {
        "cost": "output-error",
        "unit": "matrix",
        "scope": "global",
        "shares": "none",
        "solver": "auto",
    },
    "weight error, matrix units, global": {
        "cost": "weight-error",
        "unit": "matrix",
        "scope": "global",
        "shares": "none",
        "solver": "auto",
    },
}

BITSMOE: dict[str, Row] = {
    "bitsmoe as it comes": {"method": "bitsmoe"},
    "bitsmoe, rounded to nearest": spectral(quantizer="rtn"),
    "bitsmoe, dropping counts once (the paper's)": spectral("drop=1"),
    "bitsmoe, dropping counts three times": spectral("drop=3"),
    "bitsmoe, dropping counts three times, rounded to nearest": spectral("drop=3", quantizer="rtn"),
    "bitsmoe, dropping counts thirty times": spectral("drop=30"),
    "bitsmoe as in the paper": spectral("joint=false,drop=1,importance=routing", quantizer="alternating"),
    "bitsmoe, bases apart (the paper's)": spectral("joint=false"),
    "bitsmoe, identity basis": spectral("basis=identity"),
    "bitsmoe, basis for the inputs": spectral("metric=inputs"),
    "bitsmoe, importance by routing (the paper's)": spectral("importance=routing"),
    "bitsmoe, exact errors": spectral("errors=exact"),
    "bitsmoe, no activation term": spectral("activation=false"),
    "bitsmoe, no energy term": spectral("energy=false"),
    "bitsmoe, uniform bits": spectral("activation=false,energy=false"),
    "bitsmoe, 16-bit basis": spectral("basis_bits=16"),
    "bitsmoe, without 0 bits": spectral(candidates="1,2,3,4,6,8"),
    "bitsmoe, budget per layer": spectral(scope="layer"),
}

TILEQ: dict[str, Row] = {
    "tileq, rank auto": {"method": "tileq", "rank": "auto"},
    "tileq, rank 2": tiled(rank=2),
    "tileq, rank 4": tiled(),
    "tileq, rank 8": tiled(rank=8),
    "tileq, rank 4, random placement": tiled("placement=random"),
    "tileq, private factors of the same bytes": tiled("grid=private", rank=1),
    "tileq, no scale": tiled("alpha=0"),
    "tileq, rotation": {"method": "tileq", "rank": "4", "tile_options": "down=true,rotation=expert"},
    "tileq, rotation alone": {"method": "tileq", "rank": "0", "tile_options": "down=true,rotation=expert"},
    "tileq, rank 4, vector": tiled(quantizer="vector"),
    "tileq, rank 4, gemq widths": tiled(allocation="gemq"),
}

DEFAULT: dict[str, Row] = {
    "gemq as it comes": {"method": "gemq"},
    "gemq as it comes, gptq": {"method": "gemq", "quantizer": "gptq"},
    "gemq as it comes, gptq, the worst text counts": {
        "method": "gemq",
        "quantizer": "gptq",
        "cost_options": "texts=worst",
    },
    "gemq as it comes, gptq, all tokens in one sum": {
        "method": "gemq",
        "quantizer": "gptq",
        "cost_options": "texts=pooled",
    },
}
"""gemq as the methods' table has it. Costs of each text apart, of chosen tokens of 48 sequences."""

TRELLIS: dict[str, Row] = {
    "uniform": MAIN["uniform"],
    "uniform, trellis": {"method": "uniform", "quantizer": "trellis"},
    "gemq as it comes, gptq": DEFAULT["gemq as it comes, gptq"],
    "gemq as it comes": {"method": "gemq"},
}
"""Trellis codes against scalar levels, all else equal."""

TUNED: dict[str, Row] = {"gemq as it comes, tuned": {"method": "gemq", "tune": "model"}}
"""Routers, norms and biases trained after packing."""

AUTO: dict[str, Row] = {"auto": {"method": "auto", "effort": "fast"}}
"""No method named, but for the check against uniform, which changes nothing where it is passed."""

SHARES: dict[str, Row] = {
    "auto, tuned": {"method": "auto", "effort": "fast", "tune": "model"},
    "auto without trellises": {"method": "auto", "effort": "fast", "quantizer": "gptq"},
    "auto without costs": {"method": "uniform", "quantizer": "trellis", "compensate": True},
    "auto by expert": {"method": "auto", "effort": "fast", "unit": "expert"},
    "auto, all tokens in one sum": {"method": "auto", "effort": "fast", "cost_options": "texts=pooled"},
    "gemq as it comes": DEFAULT["gemq as it comes"],
    "uniform": MAIN["uniform"],
    "uniform, compensation": {"method": "uniform", "compensate": True},
    "uniform, trellis": {"method": "uniform", "quantizer": "trellis"},
    "gemq, matrix units": MAIN["gemq, matrix units"],
    "gemq as it comes, gptq": DEFAULT["gemq as it comes, gptq"],
}
"""What each ingredient is worth: left out of auto, and put into uniform alone."""

MOST = MAIN | {"gemq as it comes": DEFAULT["gemq as it comes"]}
CONTRAST = (
    MOST
    | AUTO
    | {
        name: row
        for name, row in {**ALPHAQ, **GEMQ, **BITSMOE, **TILEQ}.items()
        if name
        in (
            "alphaq, gamma 0",
            "alphaq, alpha shuffled",
            "alphaq, alpha reversed",
            "gemq, matrix units, progressive",
            "bitsmoe, identity basis",
            "bitsmoe, uniform bits",
            "bitsmoe, budget per layer",
            "tileq, rank 4",
            "tileq, rank 4, random placement",
            "tileq, private factors of the same bytes",
            "tileq, rotation",
        )
    }
)
"""What decides the claims, for a second model."""

METHODS: dict[str, Row] = {
    **AUTO,
    **SHARES,
    **MAIN,
    **DEFAULT,
    **TUNED,
    **TRELLIS,
    **QUANTIZERS,
    **ALPHAQ,
    **GEMQ,
    **BITSMOE,
    **TILEQ,
}
"""Row -> options beside budget, seed and calibration."""

GROUPS: dict[str, tuple[str, dict[str, Row]]] = {
    "auto": ("auto", AUTO),
    "shares": ("Shares of the ingredients", SHARES),
    "default": ("gemq as it comes", DEFAULT),
    "bundled": ("gemq as it comes", {"uniform": MAIN["uniform"]}),
    "main": ("Methods", MAIN),
    "quantizers": ("Quantizers of uniform bits", QUANTIZERS),
    "gemq": ("Parts of gemq", GEMQ),
    "alphaq": ("Parts of alphaq", ALPHAQ),
    "bitsmoe": ("Parts of bitsmoe", BITSMOE),
    "tileq": ("Parts of tileq", TILEQ),
    "trellis": ("Trellis codes", TRELLIS),
    "tuned": ("gemq as it comes", TUNED),
    "budgets": ("Methods", MOST),
    "seeds": ("Methods", MOST),
    "contrast": ("Methods", CONTRAST),
}
"""Group -> heading, rows; in the order in which they are measured."""


def wanted(groups: list[str], model: str) -> list[Row]:
    """Every row of some groups: the first seed of all texts, then other budgets, then other seeds."""
    found = []
    for group in groups:
        title, methods = GROUPS[group]
        budgets, seeds, texts = (BITS,), SEEDS[:1], ("both",)
        if group in ("main", "default"):
            texts = ("both", "c4", "mixture", *(("bundled",) if group == "default" else ()))
        elif group == "bundled":
            texts = ("bundled",)
        elif group == "auto":
            budgets, seeds, texts = (BITS, 1.6, 3.125, 2.5), SEEDS, ("both", "c4", "mixture", "bundled")
        elif group == "tuned":
            texts = ("both", "c4", "mixture", "bundled")
        elif group == "trellis":
            budgets, seeds, texts = (BITS, 1.6, 3.125), SEEDS, ("both", "c4")
        elif group == "budgets":
            budgets = BUDGETS
        elif group == "seeds":
            seeds = SEEDS[1:]
        common = {"group": group, "title": title, "model": model}
        found += [
            {**common, "name": name, "calibration": text, "bits": bits, "seed": seed}
            for seed in seeds
            for bits in budgets
            for text in texts
            for name in methods
            if not (group == "trellis" and text == "c4" and (seed or bits != BITS))
            if not (group == "auto" and (bits in (1.6, 2.5) and (text != "both" or seed > 1)))
            if not (group == "auto" and text == "bundled" and (seed or bits != BITS))
            if not (group == "auto" and text in ("both", "mixture") and bits == 3.125 and seed)
        ]
    return found
