"""A recipe: every choice of a quantization run, under the names that CLI, YAML and Python API share."""

import dataclasses
import itertools
from typing import Any, get_type_hints

import yaml

from moeq import codec
from moeq.budget import Budget, parse_size
from moeq.errors import OptionError
from moeq.layouts.tiled.shape import MAX_RANK, RESIDUALS, TileOptions, tile_options
from moeq.methods import AUTO_LEVELS, METHODS, OWN_LEVELS, Method, method
from moeq.option_values import by_kind, choose, named_values, numbers, typed, widths
from moeq.served import SERVES, Served
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, WHOLE_ROW, QuantSpec

DENSE_KINDS = ("attention", "shared", "dense", "lm_head")
DENSE_BITS = (16, 8, 6, 4)
AUTO = "auto"
JOINING_KINDS = ("attention", "shared", "dense")
"""Linears that may be units of the program. The head is not one: it decides about tokens, and is none of any block."""
ACCOUNTINGS, MTP = ("bytes", "codes"), ("keep", "pack", "drop")
UNITS, SCOPES = ("expert", "matrix", "component"), ("global", "layer")
ROUTER_LOSSES, TUNES = ("none", "task", "kl"), ("none", "model")
EFFORTS = ("fast", "normal", "best")
DEFAULT_CANDIDATES = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The options of `moeq quantize`.

    Attributes:
        method: a row of `moeq.methods.METHODS`.
        effort: of auto: "fast", "normal" (None) or "best" (`moeq.stages.auto`), or a time to keep to, as "2h".
        bits: mean bits per expert weight, counted as `accounting` says.
        size: bytes of the whole checkpoint, as "8GB"; instead of `bits`.
        accounting: "bytes": `bits` covers scales, zeros and padding; "codes": code bits only.
        quantizer: None takes the method's own.
        group_size: inputs per scale; -1 for whole rows.
        levels: level set, or "auto".
        dense_bits: width of the other linears: one number for all but lm_head, or "attention=4,lm_head=8". "auto", for
            all but lm_head or for some kinds, lets the program that spends `size` on the experts choose theirs too.
        calibration: texts, "a.txt:0.5,b.jsonl:0.5", "bundled" (`moeq.calibration.texts`), or "none" as None.
        nsamples, seqlen: calibration sequences, and tokens of each.
        seed: of everything random.
        routing: "natural", "all" or a number r: which experts' statistics see a token.
        act_order: gptq: columns by falling importance.
        damp: gptq's damping, in mean diagonals of the Hessian.
        gain: rescale what was rounded to the original's length (docs/decisions/0013).
        compensate: fit down to what rounded gate and up answer (docs/decisions/0030); None takes the method's own.
        device: "auto", "cpu" or "cuda[:n]".
        plan: path of a Plan to follow instead of allocating; a plan of components needs its `costs` too.
        cost: name of the cost that ranks units; None takes the method's own, as all that follow.
        cost_options: options of the cost, as "gamma=12,noise=measured".
        costs: path of a CostTable to use instead of measuring.
        unit: "expert", "matrix" or "component".
        candidates: code widths that a unit may get, as "1,2,3"; 0 drops a component.
        scope: "global" or "layer".
        shares: minimum shares of widths in every layer: "none", "c2c3", "3:1,2:1" or "3+:10%".
        solver: its name.
        context: path of a packed checkpoint of this model whose activations and gradients costs are measured on.
        round_context: costs are those of rounding the context's weights once more (GEMQ's loop read literally).
        router: loss that routers are tuned with after packing: "none", "task" or "kl".
        router_epochs, router_lr: passes over the calibration text, and rate of what is trained.
        serve: one of `SERVES`; what it cannot run is not made.
        tune: what is trained after packing besides: "model", scales, norms, biases, routers by "kl", or "none".
        quality: measure quality on held-out windows of the calibration text, if the original is small.
        rank: components of the tiled low-rank factors; "auto" takes what the budget leaves, None a small share if any.
        allocation: for the tiled layout, the method whose unit, cost and solver choose the residuals' widths.
        tile_options: choices of the tiled layout, as "grid=8x16,rotation=expert" (`layouts.tiled.shape.TileOptions`).
        mtp: layers that predict further tokens: "keep", "pack" (their experts, without data), or "drop".
        trust_remote_code: the code in the model's directory may run, if transformers does not have the model.
        progressive: falling budgets to go through first, as "3,2.5", each measured on the result of the one before.
    """

    method: str = "uniform"
    effort: str | None = None
    bits: float | None = None
    size: str | None = None
    accounting: str = "bytes"
    quantizer: str | None = None
    group_size: int = 128
    levels: str = "auto"
    dense_bits: str = "16"
    calibration: str | None = None
    nsamples: int = 128
    seqlen: int = 512
    seed: int = 0
    routing: str = "natural"
    act_order: bool = True
    damp: float = 0.1
    gain: bool = True
    compensate: bool | None = None
    device: str = "auto"
    plan: str | None = None
    cost: str | None = None
    cost_options: str | None = None
    costs: str | None = None
    unit: str | None = None
    candidates: str | None = None
    scope: str | None = None
    shares: str | None = None
    solver: str | None = None
    context: str | None = None
    round_context: bool = False
    router: str | None = None
    router_epochs: int = 1
    router_lr: float | None = None
    serve: str = "moeq"
    tune: str = "none"
    quality: bool = True
    rank: str | None = None
    allocation: str | None = None
    tile_options: str | None = None
    progressive: str | None = None
    mtp: str = "keep"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            # The same choice must be the same bytes in hashes, journal and YAML, whoever made it: 3 is 3.0.
            object.__setattr__(self, name, typed(name, kind, getattr(self, name)))
        method(self.method)
        choose("accounting", self.accounting, ACCOUNTINGS)
        choose("mtp", self.mtp, MTP)
        choose("serve", self.serve, tuple(SERVES))
        choose("group-size", self.group_size, GROUP_SIZES)
        choose("levels", self.levels, ("auto", *SCALAR_LEVELS))
        counts = ("nsamples", self.nsamples, 1), ("seqlen", self.seqlen, 2), ("router-epochs", self.router_epochs, 1)
        for name, value, least in (*counts, ("seed", self.seed, 0)):
            if value < least:
                raise OptionError(f"{value} is too small", option=name, fix=f"give at least {least}")
        if not self.damp > 0:
            raise OptionError(f"{self.damp} is not positive", option="damp", fix="the usual value is 0.01")
        if self.routing not in ("natural", "all") and not (self.routing.isdecimal() and int(self.routing) >= 2):
            raise OptionError(
                f"{self.routing!r} is not a routing mode", option="routing", fix="give natural, all or a number from 2"
            )
        if self.bits is not None or self.size is not None:
            self.budget()
        self.dense()
        if self.joining() and self.accounting == "codes":
            raise OptionError(
                "auto spends stored bytes, not code bits", option="dense-bits", fix="drop --accounting codes"
            )
        self._check_allocation()
        if self.served.alike:
            _check_alike(self)

    def _check_allocation(self) -> None:
        if self.mtp == "pack" and not (method(self.method).alone and self.quantizer != "vector"):
            raise OptionError(
                "experts that no module runs are packed matrix by matrix, without data",
                option="mtp",
                fix="use --mtp keep, or a method of grouped matrices and another quantizer than vector",
            )
        for name, value, choices in (
            ("unit", self.unit, UNITS),
            ("scope", self.scope, SCOPES),
            ("router", self.router, ROUTER_LOSSES),
            ("tune", self.tune, TUNES),
        ):
            if value is not None:
                choose(name, value, choices)
        if self.tune == "model" and self.router not in (None, "kl"):
            raise OptionError(f"routers are tuned by kl, not {self.router}", option="tune", fix="drop --router")
        if self.effort is not None and not method(self.method).chooses:
            raise OptionError(f"method {self.method} tries nothing", option="effort", fix="use --method auto")
        if self.router_lr is not None and not 0 < self.router_lr <= 1:
            raise OptionError(f"{self.router_lr} is no learning rate", option="router-lr", fix="the usual is 0.0001")
        if self.round_context and self.context is None and self.progressive is None:
            raise OptionError(
                "there is no context to round", option="round-context", fix="give --context or --progressive"
            )
        self.options_of_cost()
        self.candidate_bits()
        self._check_components()
        self._check_tiles()
        budgets = self.progressive_bits()
        if any(low >= high for high, low in itertools.pairwise(budgets)) or (
            budgets and self.bits is not None and budgets[-1] <= self.bits
        ):
            message, fix = "the budgets must fall, down to --bits", "give for example 3,2.5 with --bits 2"
            raise OptionError(message, option="progressive", fix=fix)
        if budgets and self.bits is None:
            raise OptionError("it needs a budget in bits to end at", option="progressive", fix="give --bits")
        _check_used(self)

    def _check_components(self) -> None:
        row = self.choosing
        named = (self.cost or row.cost) == "spectral-energy"
        if self.plan is None and named != self.has_components:
            raise OptionError(
                "components go with the cost spectral-energy, and only with it",
                option="unit",
                fix="use --method bitsmoe, or --cost spectral-energy --unit component",
            )
        if not self.has_components:
            return
        if (self.shares or "none") != "none" or (self.solver or "threshold") != "threshold" or self.joining():
            message = "components are chosen by threshold, among themselves and without shares"
            raise OptionError(message, option="solver", fix="drop --solver, --shares and --dense-bits auto")
        if (self.quantizer or row.quantizer) == "gptq-mc":
            raise OptionError("gptq-mc does not round components", option="quantizer", fix="use rtn or gptq")

    def _check_tiles(self) -> None:
        if self.plan is None:
            self._check_own_options()
        if self.allocation is not None:
            method(self.allocation)  # refuses names that nobody knows
            choose("allocation", self.allocation, tuple(n for n, row in METHODS.items() if row.layout in RESIDUALS))
        self.tiles()
        if self.rank is not None and self.rank != AUTO and not (self.rank.isdecimal() and int(self.rank) <= MAX_RANK):
            raise OptionError(f"{self.rank!r} is no rank", option="rank", fix=f"give 0 to {MAX_RANK}, or auto")
        if self.quantizer == "trellis" and method(self.method).unit == "component":
            raise OptionError(f"{self.method} stores no trellises", option="quantizer", fix="use gptq")
        if self.quantizer == "vector" and self.plan is None and (self.cost or self.choosing.cost):
            fix = "use gptq, or a method that gives all matrices alike"
            raise OptionError("costs are not measured with codebooks", option="quantizer", fix=fix)

    def _check_own_options(self) -> None:
        """Refuse options that belong to another method's layout."""
        own = method(self.method).own_options
        for other, row in METHODS.items():
            for name in row.own_options:
                if name not in own and getattr(self, name) is not None:
                    message, option = f"it has no effect with method {self.method}", name.replace("_", "-")
                    raise OptionError(message, option=option, fix=f"add --method {other}")

    @property
    def choosing(self) -> Method:
        """The method that chooses widths."""
        return method(self.allocation or self.method)

    @property
    def text(self) -> str | None:
        """What `calibration` names, None for nothing."""
        return None if self.calibration == "none" else self.calibration

    def tiles(self) -> TileOptions:
        """The choices of the tiled layout."""
        return tile_options(named_values(self.tile_options, "tile-options", "grid=8x16"))

    def settled(self) -> "Recipe":
        """With the method's own choices where none was made; the quantizer depends on whether there is text."""
        own, row = method(self.method), self.choosing
        known = bool(row.cost or self.cost) and self.plan is None
        plain = self.levels != "auto" or self.served.alike
        with_text = "gptq" if plain and own.quantizer in OWN_LEVELS else own.quantizer
        usual = (self.served.quantizer or with_text) if self.text else (self.served.dataless or own.dataless)
        return self.replace(
            quantizer=self.quantizer or usual,
            cost=(self.cost or row.cost) if known else None,
            unit=(self.unit or row.unit) if known else None,
            scope=(self.scope or row.scope) if known else None,
            shares=(self.shares or ("none" if self.served.alike else row.shares)) if known else None,
            solver=(self.solver or row.solver) if known else None,
            effort=(self.effort or "normal") if own.chooses else None,
            compensate=(own.compensate if self.compensate is None else self.compensate) and self.text is not None,
            router="kl" if self.tune == "model" else self.router or own.router,
        )

    @property
    def served(self) -> Served:
        """What the program that will run it can hold."""
        return SERVES[self.serve]

    def options_of_cost(self) -> dict[str, Any]:
        """The cost's options: the method's where it is the method's cost, and what `cost_options` says."""
        row = self.choosing
        options = dict(row.cost_options) if self.cost in (None, row.cost) else {}
        return options | named_values(self.cost_options, "cost-options", "gamma=12")

    def candidate_bits(self, budget: float | None = None) -> tuple[int, ...]:
        """Code widths that a unit may get, rising.

        The method's own, and wider ones while the budget could pay for more than the widest.

        Args:
            budget: mean bits per weight that can be spent; None takes `bits`, or enough for most uses.
        """
        if self.candidates is None:
            own = self.choosing.candidates or DEFAULT_CANDIDATES
            if self.has_components:
                return own
            own = self.served.candidates or (tuple(bits for bits in own if bits > 1) if self.served.alike else own)
            asked = budget or self.bits or DEFAULT_CANDIDATES[-1] - 0.5
            top = next((width for width in BITS if width > asked), BITS[-1])
            return own + tuple(bits for bits in BITS if own[-1] < bits <= top)
        return widths(self.candidates, "candidates", (0, *BITS) if self.has_components else BITS)

    @property
    def has_components(self) -> bool:
        """Whether spectral components are what gets widths."""
        return self.plan is None and (self.unit or self.choosing.unit) == "component"

    def progressive_bits(self) -> tuple[float, ...]:
        """The budgets before the last."""
        return numbers(self.progressive, "progressive", "budgets", "3,2.5")

    def budget(self) -> Budget:
        """The budget that `bits`, `size` and `accounting` mean."""
        size = None if self.size is None else parse_size(self.size)
        if self.bits is None and size is None:
            raise OptionError("no budget was given", option="bits", fix="give --bits 3 or --size 8GB")
        if size is None and self.joining():
            raise OptionError(
                "auto shares one budget between experts and other linears, bits count experts alone",
                option="dense-bits",
                fix="give --size instead of --bits",
            )
        if self.accounting == "codes":
            return Budget(code_bits=self.bits, size=size)
        return Budget(bits=self.bits, size=size)

    def dense(self) -> dict[str, int]:
        """Kind of linear -> bits (16 means untouched, or that the program decides)."""
        return {kind: 16 if width == AUTO else int(width) for kind, width in self._dense().items()}

    def joining(self) -> tuple[str, ...]:
        """Kinds of linears whose widths the program decides."""
        return tuple(kind for kind, width in self._dense().items() if width == AUTO)

    def _dense(self) -> dict[str, int | str]:
        legal = {kind: (*DENSE_BITS, AUTO) if kind in JOINING_KINDS else DENSE_BITS for kind in DENSE_KINDS}
        return by_kind(str(self.dense_bits), "dense-bits", legal, common=JOINING_KINDS)

    def level_set(self, bits: int) -> str:
        """The level set for a code width: `levels`, or what was measured best per stored byte."""
        if self.levels != "auto":
            return self.levels
        return self.served.levels or AUTO_LEVELS[bits]

    def spec(self, bits: int) -> QuantSpec:
        """How a matrix of a code width is stored."""
        if bits in OWN_LEVELS.get(str(self.quantizer), ()):
            size = self.group_size if self.quantizer == "trellis" else WHOLE_ROW
            return QuantSpec(bits=bits, group_size=size, levels=str(self.quantizer).removesuffix("-rtn"))
        layout = method(self.method).records
        return QuantSpec(bits=bits, group_size=self.group_size, levels=self.level_set(bits), layout=layout)

    def dense_spec(self, bits: int) -> QuantSpec:
        """How a linear outside the experts is stored at a width."""
        size = WHOLE_ROW if self.served.levels == "ggml" else self.group_size
        return QuantSpec(bits=bits, group_size=size, levels=self.level_set(bits))

    def component_levels(self, bits: int) -> str:
        """The level set of components of a code width; those of the released quantizer if that is used."""
        if self.levels != "auto":
            return self.levels
        return "half" if bits <= (1 if self.quantizer == "alternating" else 2) else "sym"

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some options changed; None changes nothing."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})

    def to_yaml(self) -> str:
        """The recipe as YAML; defaults included, so that it stays the same under later versions."""
        return yaml.safe_dump(codec.encode(self), sort_keys=False)


def _check_alike(recipe: Recipe) -> None:
    """Refuse what the program that will run it does not hold."""
    own = recipe.served.quantizers
    for wrong, option in (
        (method(recipe.method).layout != "grouped" or recipe.has_components, "method"),
        (recipe.quantizer not in (None, *own) if own else recipe.quantizer in OWN_LEVELS, "quantizer"),
        (recipe.levels not in ("auto", recipe.served.levels), "levels"),
        (1 in recipe.candidate_bits(), "candidates"),
        (recipe.mtp == "pack", "mtp"),
    ):
        if wrong:
            value, fix = getattr(recipe, option), f"give another --{option}, or drop --serve"
            raise OptionError(f"{recipe.serve} holds nothing of {value}", option=option, fix=fix)


def _check_used(recipe: Recipe) -> None:
    """Refuse options that nothing would look at."""
    if recipe.plan is not None:
        if recipe.joining():
            raise OptionError("auto has no effect with --plan", option="dense-bits", fix="drop one of the two")
        for name in ("bits", "size", "cost", "unit", "candidates", "shares", "progressive", "rank", "allocation"):
            if getattr(recipe, name) is not None:
                raise OptionError("it has no effect with --plan", option=name, fix="drop one of the two")
    if recipe.cost is None and recipe.choosing.cost is None:
        if recipe.joining():
            raise OptionError(
                f"auto needs costs, and method {recipe.method} ranks nothing",
                option="dense-bits",
                fix="choose --method gemq, or a width",
            )
        names = ("cost_options", "unit", "candidates", "scope", "shares", "solver", "context", "progressive")
        for name in names if recipe.plan else (*names, "costs"):  # a plan of components needs the bases in them
            if getattr(recipe, name) is not None:
                option = name.replace("_", "-")
                methods = ", ".join(other for other, row in METHODS.items() if row.cost)
                message = f"method {recipe.allocation or recipe.method} makes no choice per unit"
                raise OptionError(message, option=option, fix=f"choose a --method of {methods}")
