"""Where a shared basis loses: what dropping and rounding do apart, by layer, and what experts have in common.

    python benchmarks/spectral_stages.py [--model MODEL] --costs FILE [--bits 2.125]

FILE is what `moeq measure --method bitsmoe` made of the model. Experts are changed in memory, in float32: components
that the plan drops are zeros or left as they are, all others rounded or left as they are. The basis is that of the
file, rounded to 8 bits: components are those of the rounded basis, so that it costs bytes and no error.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench, Row, arguments, mean_kl, parse
from numpy.typing import NDArray
from torch import Tensor, nn

from moeq.allocation import plans
from moeq.arch.inventory import read_inventory
from moeq.artifacts import Inventory, Plan
from moeq.costs.component_table import ComponentTable, decoded_basis
from moeq.quantizers.gain import rounded_weights
from moeq.quantizers.registry import make_quantizer
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.spec import QuantSpec
from moeq.transforms import shared_basis

CPU = torch.device("cpu")
Change = Callable[[Tensor, NDArray[np.uint8]], Tensor]
"""Components (H, I) and their widths (H,) -> what becomes of them."""
SPECS = {b: QuantSpec(bits=b, levels="half" if b < 3 else "sym", layout="spectral") for b in (1, 2, 3, 4, 6, 8)}


def dropped(p_HI: Tensor, widths_H: NDArray[np.uint8]) -> Tensor:
    """Components without a width are zeros, the others exact."""
    return p_HI * torch.from_numpy(widths_H > 0)[:, None]


def rounded(p_HI: Tensor, widths_H: NDArray[np.uint8]) -> Tensor:
    """Components with a width are rounded, the others exact."""
    quantizer, out = make_quantizer("rtn", gain=True), p_HI.clone()
    for bits, spec in SPECS.items():
        rows = torch.from_numpy(np.flatnonzero(widths_H == bits))
        if len(rows):
            out[rows] = rounded_weights(quantizer.quantize(p_HI[rows], spec, None), spec)
    return out


def both(p_HI: Tensor, widths_H: NDArray[np.uint8]) -> Tensor:
    """As a packed model has it."""
    return dropped(rounded(p_HI, widths_H), widths_H)


def experts(model: nn.Module, path: str) -> Iterator[tuple[int, str, Tensor]]:
    """Every matrix of a layer, (N, K), as a view of the model's own."""
    module: Any = model.get_submodule(path)
    inner = module.down_proj.shape[-1]
    for expert in range(len(module.down_proj)):
        yield expert, "gate", module.gate_up_proj[expert, :inner]
        yield expert, "up", module.gate_up_proj[expert, inner:]
        yield expert, "down", module.down_proj[expert]


@torch.no_grad()
def changed(
    bench: Bench, table: ComponentTable, plan: Plan, inventory: Inventory, change: Change, only: int | None = None
) -> tuple[nn.Module, dict[int, float]]:
    """The model with other experts, and the relative squared error of each layer's weights."""
    model, errors = bench.open(bench.model), {}
    for index, layer in enumerate(inventory.layers):
        if only is not None and index != only:
            continue
        widths = plan.widths(index, layer)
        parts = {name: table.layer(index, name) for name in layer.projections}
        bases = {name: decoded_basis(part.rows, part.scale_HG, CPU) for name, part in parts.items()}
        inverses = {name: shared_basis.inverse_of(basis_HH) for name, basis_HH in bases.items()}
        lost = whole = 0.0
        for expert, name, w_NK in experts(model, layer.path):
            p_HI = change(shared_basis.components(w_NK, inverses[name], name), widths[name][expert])
            new_NK = bases[name].T @ p_HI if name == "down" else p_HI.T @ bases[name]
            lost, whole = lost + float((new_NK - w_NK).square().sum()), whole + float(w_NK.square().sum())
            w_NK.copy_(new_NK)
        errors[index] = lost / whole
    return model, errors


@torch.no_grad()
def common(bench: Bench, inventory: Inventory, share: float = 0.25) -> list[tuple[str, ...]]:
    """Energy in the first quarter of directions: of a shared basis, of each expert's own, of a control.

    In the control every expert's hidden side is rotated on its own: the same spectra, nothing in common.
    """
    model, lines = bench.open(bench.model), []
    for index, layer in enumerate(inventory.layers):
        for name in layer.projections:
            all_NH = [w.T if n == "down" else w for _, n, w in experts(model, layer.path) if n == name]
            hidden = all_NH[0].shape[1]
            first = int(share * hidden)
            random = torch.Generator().manual_seed(0)
            turns = [torch.linalg.qr(torch.randn(hidden, hidden, generator=random)).Q for _ in all_NH]
            values = []
            for matrices in (all_NH, [w @ q for w, q in zip(all_NH, turns, strict=True)]):
                gram_HH = sum(w.T.double() @ w.double() for w in matrices)
                eigen_H = torch.linalg.eigvalsh(gram_HH).flip(0)
                values.append(float(eigen_H[:first].sum() / eigen_H.sum()))
            own = [torch.linalg.svdvals(w.double()).square() for w in all_NH]
            values.append(float(sum(s[:first].sum() for s in own) / sum(s.sum() for s in own)))
            lines.append((str(index), name, *(f"{value:.3f}" for value in values)))
    return lines


def main() -> None:
    """All of it, as tables."""
    parser = arguments("spectral_stages", __doc__)
    parser.set_defaults(model=Path("../shared/models/ref-qwen3moe-62m"), max_tokens=8192)
    parser.add_argument("--costs", required=True)
    parser.add_argument("--bits", type=float, default=2.125)
    parser.add_argument("--scopes", nargs="+", default=["global", "layer"])
    args = parse(parser)
    bench = Bench.of(args, seqlen=512, evenly=True)
    inventory, headers = read_inventory(bench.model)
    table = ComponentTable(Path(args.costs))
    print(markdown_table(("layer", "projection", "shared", "control", "own"), common(bench, inventory)), flush=True)
    rows: list[Row] = []
    for scope in args.scopes:
        recipe = Recipe(method="bitsmoe", bits=args.bits, costs=args.costs, scope=scope, calibration="-").settled()
        plan = plans.run(inventory, headers, recipe, table=table)
        for change in (dropped, rounded, both):
            for only in (None, *(range(len(inventory.layers)) if scope == "global" else ())):
                model, errors = changed(bench, table, plan, inventory, change, only)
                row = {"scope": scope, "stage": change.__name__, "layer": only, "errors": errors}
                rows.append(row | {"kl": mean_kl(bench.measure(model))})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
