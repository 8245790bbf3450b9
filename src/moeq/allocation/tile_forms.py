"""Which tiles a run gets: the forms of all sides, from shapes, options and the budget alone."""

from typing import Final

from moeq.artifacts import Inventory
from moeq.layouts.tiled.shape import TileForm, sides_bytes, tile_form, tile_table_bytes
from moeq.methods import method
from moeq.model_parts import MoeLayer
from moeq.recipe import AUTO, Recipe
from moeq.spec import BITS, stored_bytes, table_bytes

AUTO_RANKS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
AUTO_SHARE: Final = 0.02
"""What the factors get of a budget that leaves nothing over."""
WORTH: Final = 0.008
"""Bits per weight that a component may cost to be taken unasked. c bits of codes lower squared errors by 2 ln 2 c; on
the reference model the first components lower them by 1.3 % each, worth 0.009 bits (benchmarks/tileq.md)."""

Tiles = tuple[dict[str, TileForm], ...]


def forms(inventory: Inventory, recipe: Recipe) -> Tiles:
    """Layer -> projection -> how its sides are stored; nothing if the method has no tiles.

    Rank "auto" is the largest of `AUTO_RANKS` whose factors take no more than what the budget leaves above the widest
    common width of all residuals, or 2 % of the budget if that is more. Where no rank is given, factors get 2 % if
    experts are so large and many that a component costs no more than `WORTH`, and nothing otherwise.

    Raises:
        OptionError: the model cannot be stored so.
    """
    if "rank" not in method(recipe.method).own_options:
        return ()
    if recipe.rank not in (None, AUTO):
        return _forms(inventory, recipe, int(str(recipe.rank)))
    budget = recipe.budget()
    bits = budget.bits or budget.code_bits or 8 * (budget.size or 0) / inventory.parameters
    total = int(bits * inventory.expert_parameters / 8)
    left = 0
    if budget.bits is not None and recipe.rank == AUTO:
        units = list(inventory.units())
        widths = [sum(stored_bytes(recipe.spec(bits), shape) for _, shape in units) for bits in BITS]
        tables = sum(table_bytes(layer.num_experts, len(layer.projections)) for layer in inventory.layers)
        left = total - tables - max((size for size in widths if size + tables <= total), default=total)
    best: Tiles = _forms(inventory, recipe, 0)
    without = all_bytes(inventory, best)
    if recipe.rank is None and component_bits(inventory, recipe) > WORTH:
        return best
    for rank in AUTO_RANKS:
        found = _forms(inventory, recipe, rank)
        if all_bytes(inventory, found) - without > max(left - without, int(AUTO_SHARE * total)):
            break
        best = found
    return best


def component_bits(inventory: Inventory, recipe: Recipe) -> float:
    """What one component costs, in bits for each weight of the projections that have factors; 0 if none has any."""
    few, many = (_forms(inventory, recipe, rank) for rank in (8, 16))
    weights = sum(
        layer.num_experts * layer.shapes[name][0] * layer.shapes[name][1]
        for layer, each in zip(inventory.layers, many, strict=True)
        for name, form in each.items()
        if form.rank
    )
    return (all_bytes(inventory, many) - all_bytes(inventory, few)) / weights if weights else 0.0


def all_bytes(inventory: Inventory, tiles: Tiles) -> int:
    """Stored bytes of all sides, tables included."""
    return sum(
        sides_bytes(each, layer.num_experts, layer.shapes) + tile_table_bytes(len(each))
        for each, layer in zip(tiles, inventory.layers, strict=True)
    )


def _forms(inventory: Inventory, recipe: Recipe, rank: int) -> Tiles:
    return tuple(_layer(layer, recipe, rank) for layer in inventory.layers)


def _layer(layer: MoeLayer, recipe: Recipe, rank: int) -> dict[str, TileForm]:
    options = recipe.tiles()
    return {name: tile_form(options, rank, name, layer.num_experts, layer.shapes[name]) for name in layer.projections}
