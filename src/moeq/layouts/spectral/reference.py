"""Experts in a shared basis: the torch reference (BitsMoE, section 7).

Every token is projected on the basis once, the selected experts work on the components that they kept, what they
answer is added up in the basis of the outputs, and that sum is mapped back once.

Legend: T tokens, k experts per token, S tokens of one expert, H hidden, I expert width, R directions, n components.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from moeq.arch import hooks
from moeq.kernels.facts import Kinds, kinds_of
from moeq.layouts.grouped.reference import product
from moeq.layouts.spectral.facts import SpectralFacts, spectral_facts
from moeq.layouts.spectral.shape import (
    SLAB_COLUMNS,
    SLAB_WIDTHS,
    SpectralShape,
    Widths,
    basis_bytes,
    basis_spec,
    map_bytes,
)
from moeq.layouts.spectral.stored import (
    SpectralEntry,
    check_map,
    decode_basis,
    decode_factor,
    decode_map,
    packed_order,
)
from moeq.spec import LEVELS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpectralTables:
    """What kernels for CPUs want to know of a layer.

    Attributes:
        table: where its parts lie, int64, (3, 8, 5), as on disk (docs/format.md).
        starts: first row of each expert in each slab, and one past the last, int64, (3, 7, E + 1).
        order: directions of each expert's components in the order of its rows, int16, (3, E, directions).
    """

    table: Tensor
    starts: Tensor
    order: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpectralLayer:
    """All experts of one layer.

    Attributes:
        data: the layer's blob, uint8.
        shape: of the layer.
        entries: projection -> where its parts lie.
        widths: projection -> widths of the components, (E, R).
        starts: projection -> first row of each expert in each slab, and one past the last, (slabs, E + 1).
        exact: whether kernels keep activations in floats: always, never, or (None) unless few tokens are computed.
        tables: for kernels on a CPU; None if nobody made them.
        facts: for kernels on a device; None on a CPU.
        kinds: projection -> what the components of this layer and others are; None for those of this one.
    """

    data: Tensor
    shape: SpectralShape
    entries: dict[str, SpectralEntry]
    widths: dict[str, Widths]
    starts: dict[str, np.ndarray]
    exact: bool | None = None
    tables: SpectralTables | None = None
    facts: SpectralFacts | None = None
    kinds: dict[str, Kinds] | None = None

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.shape.num_experts

    def at(self, data: Tensor) -> "SpectralLayer":
        """The layer with its bytes where they are now."""
        if data.device.type == "cpu":
            return replace(self, data=data, facts=None)
        facts = spectral_facts(self.entries, self.widths, self.starts, self.shape, data.device, self.kinds)
        return replace(self, data=data, facts=facts)

    def own_kinds(self) -> dict[str, Kinds]:
        """Projection -> what its components are."""
        return {name: kinds_of([{slab.spec for slab in entry.slabs}]) for name, entry in self.entries.items()}

    def basis(self, projection: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The basis, (R, H): a direction in each row."""
        entry = self.entries[projection]
        shape = entry.rank, self.shape.hidden
        size = basis_bytes(entry.basis_bits, *shape)
        return decode_basis(self.data[entry.basis : entry.basis + size], entry.basis_bits, shape, dtype)

    def order(self, expert: int, projection: str) -> Tensor:
        """Directions of an expert's components, in the order of `factor`'s rows, int64."""
        return torch.from_numpy(packed_order(self.widths[projection][expert])).to(self.data.device)

    def factor(self, expert: int, projection: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The components of an expert, (n, I)."""
        starts = self.starts[projection]
        rows = [(int(slab[expert]), int(slab[expert + 1])) for slab in starts]
        return decode_factor(self.data, self.entries[projection], rows, self.shape.inner, dtype)

    def dense(self, expert: int, projection: str) -> Tensor:
        """The matrix (N, K) that the components stand for, float32."""
        basis_nH = self.basis(projection)[self.order(expert, projection)]
        factor_nI = self.factor(expert, projection)
        return basis_nH.T @ factor_nI if projection == "down" else factor_nI.T @ basis_nH


def read_layer(data: Tensor, entries: tuple[SpectralEntry, ...], shape: SpectralShape, path: str) -> SpectralLayer:
    """Read the maps of a layer and prove that they fit the slabs.

    Raises:
        PackedError: they do not.
    """
    widths, starts = {}, {}
    for entry in entries:
        size = map_bytes(shape.num_experts, entry.rank)
        found = decode_map(data[entry.map : entry.map + size], shape.num_experts, entry.rank)
        check_map(found, entry, path)
        present = [width for width in SLAB_WIDTHS if any(slab.spec.bits == width for slab in entry.slabs)]
        counts = np.array([(found == width).sum(1) for width in present], dtype=np.int64).reshape(
            len(present), shape.num_experts
        )
        starts[entry.projection] = np.concatenate([np.zeros((len(present), 1), np.int64), counts.cumsum(1)], axis=1)
        widths[entry.projection] = found
    by_name = {entry.projection: entry for entry in entries}
    return SpectralLayer(data=data, shape=shape, entries=by_name, widths=widths, starts=starts).at(data)


def spectral_tables(layer: SpectralLayer) -> SpectralTables | None:
    """The tables of a layer; None where directions do not fit 16 bits, which kernels take them in."""
    names, num_experts = layer.shape.projections, layer.num_experts
    directions = max(entry.rank for entry in layer.entries.values())
    if directions > np.iinfo(np.int16).max:
        return None
    table = np.zeros((len(names), 1 + len(SLAB_WIDTHS), len(SLAB_COLUMNS)), np.int64)
    starts = np.zeros((len(names), len(SLAB_WIDTHS), num_experts + 1), np.int64)
    order = np.zeros((len(names), num_experts, directions), np.int16)
    for at, name in enumerate(names):
        entry = layer.entries[name]
        basis = basis_spec(entry.basis_bits)
        group, level = (0, 0) if basis is None else (basis.group_size, LEVELS.index(basis.levels))
        table[at, 0] = entry.basis, entry.basis_bits, group, level, entry.rank
        for slab, rows in zip(entry.slabs, layer.starts[name], strict=True):
            here, spec = SLAB_WIDTHS.index(slab.spec.bits), slab.spec
            table[at, 1 + here] = slab.offset, spec.bits, spec.group_size, LEVELS.index(spec.levels), slab.rows
            starts[at, here] = rows
        # As `packed_order`, for all experts at once: what is dropped comes last.
        falling_ER = (max(SLAB_WIDTHS) - layer.widths[name]).astype(np.uint8)
        order[at, :, : entry.rank] = np.argsort(falling_ER, axis=1, kind="stable")
    return SpectralTables(table=torch.from_numpy(table), starts=torch.from_numpy(starts), order=torch.from_numpy(order))


Components = Callable[[int, str], tuple[Callable[[torch.dtype], Tensor], Tensor | None]]
"""(expert, projection) -> its components (n, I) in a dtype, and what they are multiplied by, (n,)."""


def experts(
    module: nn.Module,
    layer: SpectralLayer,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    components: Components | None = None,
) -> Tensor:
    """The routed experts of one layer.

    Args:
        module: the family's experts module, stripped of its weights; gives activation and biases.
        layer: the packed weights.
        hidden_states: (T, H).
        top_k_index: (T, k).
        top_k_weights: (T, k).
        components: the layer's by default.

    Returns:
        (T, H) in the dtype of `hidden_states`.
    """
    find = components or (lambda expert, projection: (partial(layer.factor, expert, projection), None))
    order, counts = hooks.by_expert(top_k_index, layer.num_experts)
    tokens = order // top_k_index.shape[-1]
    inputs = {"gate": product(hidden_states, partial(layer.basis, "gate"))}
    gate, up = layer.entries["gate"], layer.entries["up"]
    joint = (gate.basis, gate.rank) == (up.basis, up.rank)  # a gate of no directions has no bytes either
    inputs["up"] = inputs["gate"] if joint else product(hidden_states, partial(layer.basis, "up"))

    def down(dtype: torch.dtype) -> Tensor:
        return layer.basis("down", dtype).T

    parts, sums = [], []
    for expert, span in hooks.spans(counts):
        chosen = tokens[span]
        gate_SI, up_SI = (_inner(layer, expert, name, inputs[name][chosen], find) for name in ("gate", "up"))
        inner_SI = hooks.activation(module, expert, gate_SI, up_SI)
        sum_SR = _outer(layer, expert, inner_SI, find)
        if hooks.answers_plainly(module):
            sums.append(sum_SR)
        else:  # a bias, or a norm of every expert's answer: it has to be known before it is weighted
            parts.append(hooks.finish(module, expert, product(sum_SR, down)))
    if not hooks.answers_plainly(module):
        return hooks.combine(parts, order, top_k_weights, hidden_states)
    total = sum(counts)
    weight_S = top_k_weights.reshape(-1)[order[:total]].float().unsqueeze(-1)
    acc_TR = weight_S.new_zeros(len(hidden_states), layer.entries["down"].rank)
    if sums:
        acc_TR = acc_TR.index_add(0, tokens[:total], torch.cat(sums).float() * weight_S)
    return product(acc_TR.to(hidden_states.dtype), down)


def _inner(layer: SpectralLayer, expert: int, projection: str, h_SR: Tensor, find: Components) -> Tensor:
    """Gate or up of one expert, (S, I)."""
    order = layer.order(expert, projection)
    h_Sn = h_SR.index_select(1, order) if len(order) else h_SR[:, :0]  # which it refuses if there are no directions
    factor, gain_n = find(expert, projection)
    return product(h_Sn if gain_n is None else h_Sn * gain_n.to(h_Sn.dtype), lambda dtype: factor(dtype).T)


def _outer(layer: SpectralLayer, expert: int, inner_SI: Tensor, find: Components) -> Tensor:
    """One expert's answers in the basis of the outputs, (S, R)."""
    factor, gain_n = find(expert, "down")
    part_Sn = product(inner_SI, factor)
    if gain_n is not None:
        part_Sn = part_Sn * gain_n.to(part_Sn.dtype)
    empty_SR = part_Sn.new_zeros(len(part_Sn), layer.entries["down"].rank)
    return empty_SR.index_copy(1, layer.order(expert, "down"), part_Sn)
