"""A recipe: every choice of a quantization run, under the names that CLI, YAML and Python API share."""

import dataclasses
from pathlib import Path, PurePath
from typing import Any, get_type_hints

import yaml

from moeq import codec
from moeq.budget import Budget, parse_size
from moeq.errors import ArtifactError, OptionError, RecipeError
from moeq.methods import method
from moeq.spec import BITS, GROUP_SIZES, LEVELS

DENSE_KINDS = ("attention", "shared", "dense", "lm_head")
DENSE_BITS = (16, 8, 6, 4)
ACCOUNTINGS = ("bytes", "codes")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The options of `moeq quantize`.

    Attributes:
        method: a row of `moeq.methods.METHODS`.
        bits: mean bits per expert weight, counted as `accounting` says.
        size: bytes of the whole checkpoint, as "8GB"; instead of `bits`.
        accounting: "bytes": `bits` covers scales, zeros and padding; "codes": code bits only.
        quantizer: None takes the method's own.
        group_size: inputs per scale; -1 for whole rows.
        levels: level set, or "auto".
        dense_bits: width of the other linears: one number for all but lm_head, or
            "attention=4,shared=8,dense=8,lm_head=16".
        calibration: a text or jsonl file, or a dataset id.
        nsamples: calibration sequences.
        seqlen: tokens of a sequence.
        seed: of everything random.
        routing: "natural", "all" or a number r: which experts' statistics see a token.
        act_order: gptq quantizes columns by falling importance.
        damp: gptq's damping, in mean diagonals of the Hessian.
        gain: rescale what was rounded so that it is not shorter than the original (docs/decisions/0013).
        device: "auto", "cpu" or "cuda[:n]".
        plan: path of a Plan to follow instead of allocating.
    """

    method: str = "uniform"
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
    device: str = "auto"
    plan: str | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            # The same choice must be the same bytes in hashes, journal and YAML, whoever made it: 3 is 3.0.
            object.__setattr__(self, name, _typed(name, kind, getattr(self, name)))
        method(self.method)
        _choose("accounting", self.accounting, ACCOUNTINGS)
        _choose("group-size", self.group_size, GROUP_SIZES)
        _choose("levels", self.levels, ("auto", *LEVELS))
        for name, value, least in (("nsamples", self.nsamples, 1), ("seqlen", self.seqlen, 2), ("seed", self.seed, 0)):
            if value < least:
                raise OptionError(f"{value} is too small", option=name, fix=f"give at least {least}")
        if not self.damp > 0:
            raise OptionError(f"{self.damp} is not positive", option="damp", fix="the usual value is 0.01")
        if self.routing not in ("natural", "all") and not (self.routing.isdecimal() and int(self.routing) >= 2):
            raise OptionError(
                f"{self.routing!r} is not a routing mode", option="routing", fix="give natural, all or a number from 2"
            )
        if self.plan is None or self.bits is not None or self.size is not None:
            self.budget()
        self.dense()

    def budget(self) -> Budget:
        """The budget that `bits`, `size` and `accounting` mean."""
        size = None if self.size is None else parse_size(self.size)
        if self.bits is None and size is None:
            raise OptionError("no budget was given", option="bits", fix="give --bits 3 or --size 8GB")
        if self.accounting == "codes":
            return Budget(code_bits=self.bits, size=size)
        return Budget(bits=self.bits, size=size)

    def dense(self) -> dict[str, int]:
        """Kind of linear -> bits (16 means untouched)."""
        bits = dict.fromkeys(DENSE_KINDS, 16)
        text = str(self.dense_bits)
        if text.isdecimal():
            bits.update(dict.fromkeys(("attention", "shared", "dense"), int(text)))
        else:
            for part in text.split(","):
                kind, _, number = part.strip().partition("=")
                _choose("dense-bits", kind, DENSE_KINDS)
                bits[kind] = int(number) if number.isdecimal() else 0
        for width in bits.values():
            _choose("dense-bits", width, DENSE_BITS)
        return bits

    def level_set(self, bits: int) -> str:
        """The level set for a code width: `levels`, or what was measured best per stored byte."""
        if self.levels != "auto":
            return self.levels
        return AUTO_LEVELS[bits]

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some options changed; None changes nothing."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})

    def to_yaml(self) -> str:
        """The recipe as YAML; defaults included, so that it stays the same under later versions."""
        return yaml.safe_dump(codec.encode(self), sort_keys=False)


AUTO_LEVELS = {bits: ("half" if bits <= 2 else "asym") for bits in BITS}


TEXTS_OF_NUMBERS = ("size", "dense_bits", "routing")


def _typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type that the field has; numbers and paths pass for the texts they stand for."""
    if isinstance(value, PurePath) or (name in TEXTS_OF_NUMBERS and type(value) is int):
        value = str(value)
    option = name.replace("_", "-")
    try:
        return codec.decode(kind, value, option)
    except ArtifactError as error:
        raise OptionError(error.message, option=option, fix="give a value of that type") from error


def _choose(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        legal = ", ".join(str(choice) for choice in choices)
        raise OptionError(f"{value!r} is not supported", option=option, fix=f"choose one of {legal}")


def load_recipe(path: Path) -> dict[str, Any]:
    """The options a YAML file gives, by name; a null counts as not given.

    Raises:
        RecipeError: not readable, not YAML, unknown keys, or values that a Recipe refuses.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", file=path, fix="give a mapping of options") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"cannot read the recipe: {reason}", file=path, fix="give a YAML file") from error
    fields = [field.name for field in dataclasses.fields(Recipe)]
    known = f"options are {', '.join(sorted(fields))}"
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping of options", file=path, fix=known)
    options: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise RecipeError(f"unknown option {str(key)[:40]!r}", file=path, fix=known)
        if name in options:
            raise RecipeError(f"option {name!r} is given twice", file=path, fix="drop one of them")
        if value is not None:
            options[name] = value
    # The command line may add the budget; everything else must be sound by itself.
    budget: dict[str, Any] = {} if options.keys() & {"bits", "size", "plan"} else {"bits": 4.0}
    try:
        recipe = Recipe(**budget, **options)
    except OptionError as error:
        raise RecipeError(error.message, file=path, option=error.option, fix=error.fix) from error
    return {name: getattr(recipe, name) for name in options}
