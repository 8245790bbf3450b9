"""Whether any layer would rather have another level set or layout than the others.

    python benchmarks/per_layer.py

Every candidate packs the whole model with the same bytes for each layer as far as it can. Then one layer of the
original at a time is replaced by the candidate's, and KL to the original is measured: what that layer costs in this
form. Bytes that differ are made up for as if errors fell by 4 with every bit.
"""

from pathlib import Path
from typing import Any

import torch
from harness import TEXTS, Bench, Row, Rows, arguments, mean_kl, parse, write_page

import moeq
from moeq.arch import hooks
from moeq.format.manifest import read_manifest
from moeq.report.tables import markdown_table
from moeq.runtime import attach

CANDIDATES: dict[str, Row] = {
    "trellis": {"method": "uniform", "quantizer": "trellis"},
    "plain levels": {"method": "uniform", "quantizer": "gptq"},
    "plain levels, zeros": {"method": "uniform", "quantizer": "gptq", "levels": "asym", "group_size": 128},
    "codebooks": {"method": "uniform", "quantizer": "vector", "group_size": -1},
    "tiled": {"method": "tileq"},
    "spectral": {"method": "bitsmoe", "scope": "layer", "cost_options": "texts=pooled"},
    "trellis, widths by costs inside the layer": {"method": "auto", "effort": "fast", "scope": "layer"},
    "spectral, compensated": {
        "method": "bitsmoe",
        "scope": "layer",
        "cost_options": "texts=pooled",
        "compensate": True,
    },
}
"""Spectral layers choose widths inside the layer in any case; grouped ones do so where it is said."""


def key_of(row: Row) -> Any:
    """What tells a row from all others."""
    return row["model"], row["name"], row["bits"], row["layer"]


def measured(name: str, bits: float, bench: Bench, rows: Rows) -> None:
    """Add the rows of a candidate."""
    with bench.packed(**bench.options(**CANDIDATES[name], bits=bits, seed=0, dense_bits="16")) as (packed, report):
        manifest = read_manifest(packed)
        donor = bench.open(packed)
        weights = report.expert_bytes * 8 / report.expert_bits_per_weight / len(manifest.layers)
        for number, layer in enumerate(manifest.layers):
            model = bench.open(bench.model)
            experts = hooks.strip_weights(model, layer.path)
            hooks.attach_handler(experts, attach.find(donor, layer.path).get_submodule(hooks.HANDLER))
            size = sum(
                info.numel()
                for tensor, info in attach.map_packed(sorted(packed.glob("*.safetensors"))).items()
                if tensor.startswith(layer.path + ".") and info.dtype == torch.uint8
            )
            row = {"model": bench.model.name, "name": name, "bits": bits, "layer": number, "stored": 8 * size / weights}
            rows.add(row | bench.measure(model))


def lines(found: list[Row], bits: float) -> list[tuple[str, ...]]:
    """A line for each candidate: what its layers cost, at equal bytes."""
    table = []
    for name in CANDIDATES:
        mine = sorted((r for r in found if (r["name"], r["bits"]) == (name, bits)), key=lambda row: int(row["layer"]))
        if mine:
            even = [1000 * mean_kl(row) * 4 ** (row["stored"] - bits) for row in mine]
            stored = sum(row["stored"] for row in mine) / len(mine)
            table.append((name, f"{stored:.3f}", *(f"{value:.1f}" for value in even)))
    return table


def main() -> None:
    """Measure what is missing, write the page."""
    parser = arguments("per_layer", __doc__)
    parser.set_defaults(model=Path("../shared/models/ref-qwen3moe-62m"), nsamples=128, max_tokens=20_480)
    parser.add_argument("--bits", nargs="+", type=float, default=[2.125, 3.125])
    args = parse(parser)
    bench = Bench.of(args, seqlen=512, evenly=True)
    rows = Rows(work=args.work, name="per_layer", key=key_of)
    for bits in args.bits:
        for name in CANDIDATES:
            if not any((row["name"], row["bits"]) == (name, bits) for row in rows.all()):
                try:
                    measured(name, bits, bench, rows)
                except moeq.MoeqError as error:
                    print(name, bits, error)
    found = rows.all()
    parts = [
        "# One layer at a time, in every form\n\nMade by `python benchmarks/per_layer.py` (moeq "
        f"{moeq.__version__}, torch {torch.__version__}), model `{bench.model.name}`, C4 as calibration text. KL to "
        "the original in thousandths of a nat, mean of " + ", ".join(TEXTS) + ", when one layer alone is packed."
    ]
    for bits in args.bits:
        table = lines(found, bits)
        header = ("form", "stored bits", *(f"layer {number}" for number in range(len(table[0]) - 2)))
        parts.append(f"## {bits:g} bits\n\n{markdown_table(header, table)}")
    write_page(args.output, parts)


if __name__ == "__main__":
    main()
