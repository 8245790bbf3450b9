"""BitsMoE's cost: energy of a component x what the inputs put on it x what its width loses (BitsMoE, section 3).

With W = P^T B (or B^T P for down), rounding component k of expert e by delta_k changes the expert's gate (or up)
products by delta_k (b_k . x) and its answer by b_k (delta_k . z). With s^2 = |p_k|^2 and D(b) the relative squared
error of b bits, the expected harm of one component is s^2 a D(b), and

    gate, up   a_ek = 1/T sum_t rho_te^2 (b_k . x_t)^2, times m_e, how far a change of g or u goes into the answer
    down       a_e  = 1/T sum_t rho_te^2 |z_t|^2 / I

over the tokens t routed to e, rho their routing weights, T all tokens of the text. That is `importance=routing`.

`importance=fisher` looks at the model's loss instead of at the layer's answer: with c_t the gradient of the loss with
respect to the layer's output, a change dz costs 1/2 (c_t . dz)^2 (GEMQ, section 2), which for one component is

    gate, up   a_ek = sum_t rho_te^2 (b_k . x_t)^2 1/I sum_j ((c_t W_d)_j dz_j/dg_j)^2
    down       a_ek = sum_t rho_te^2 (b_k . c_t)^2 |z_t|^2 / I

so that layers can be compared, and directions of the output count as the loss minds them.

Legend: T tokens, S tokens of one expert, E experts, H hidden = directions, I expert width, C candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from moeq.arch import hooks
from moeq.calibration.spill import SpillPool
from moeq.costs import coherence
from moeq.costs.base import Asked, LayerView
from moeq.costs.component_table import ProjectionCosts, decoded_basis
from moeq.costs.options import check_choice, check_number, check_switch
from moeq.errors import CalibrationError, OptionError
from moeq.layouts.spectral.shape import BASIS_BITS, basis_spec
from moeq.quantizers.gain import rounded_weights
from moeq.quantizers.registry import QUANTIZERS, make_quantizer
from moeq.transforms import shared_basis

PROJECTIONS: Final = ("gate", "up", "down")
IMPORTANCES: Final = ("routing", "fisher")
BASES: Final = ("svd", "identity")
METRICS: Final = ("weights", "inputs")
SHRINK: Final = 64
MEASURED: Final = "measured"
DROP: Final = 3.0
"""Where nothing is measured."""
JOINT: Final = True
SAMPLED: Final = 2048
"""Components of one projection of one layer that the mean error of a width is measured on."""
CHUNK: Final = 2048
"""Tokens that are worked on together."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Sums:
    """What is added up over batches for one layer.

    Attributes:
        stored: projection -> rows and scales of the basis, as they will be stored.
        energy: projection -> (E, H) float64.
        curve: projection -> (C,) float64.
        errors: projection -> exact squared errors (E, H, C) float32, if asked for.
        importance: projection -> (E, H) float64.
        reach: "gate", "up" -> (E,) float64, sum over routed tokens of how far changes go.
        whole: projection -> harm of all its components together.
        tokens_E: routed tokens.
        asked: tokens of the text.
    """

    stored: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    curve: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    reach: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PROJECTIONS, 0.0))
    tokens_E: Tensor = field(default_factory=lambda: torch.zeros(0))
    asked: int = 0


class SpectralEnergy:
    """What rounding each spectral component does; a cost of components.

    Args:
        basis_bits: 8 or 16, how the basis is stored. Components are those of the rounded basis.
        basis: "svd", or "identity" for no change of basis at all (a control).
        joint: gate and up share one basis. The paper gives each its own; one is as good (benchmarks/bitsmoe.md).
        metric: "weights", or "inputs": gate and up bases for inputs as the text has them (section 12 c).
        importance: "routing" or "fisher", see the module.
        energy: count the energy (off: a control).
        activation: count the importance (off: a control).
        propagate: multiply by m_e, for "routing".
        errors: "mean", one curve D for each projection of a layer, or "exact", each component's own errors.
        drop: harm of dropping a component, in units of its factor; the paper's is 1. "measured": that of each
            projection of each layer (`moeq.costs.coherence`); 3 without the activation term. What rounding does to
            components is independent and averages out; what is dropped acts together.
        shrink: experts with few tokens are drawn towards the mean of the layer, which counts as this many tokens.
        perturb: the quantizer that errors are measured with.
        gain: option of that quantizer.
        seed: of the components that errors are measured on.
    """

    __slots__ = (
        "_activation", "_basis", "_drop", "_energy", "_exact", "_fisher", "_joint", "_layers", "_metric", "_pool",
        "_propagate", "_quantizer", "_seed", "_shrink", "basis_bits", "needs",
    )  # fmt: skip

    def __init__(
        self,
        *,
        basis_bits: int = 8,
        basis: str = "svd",
        joint: bool = JOINT,
        metric: str = "weights",
        importance: str = "fisher",
        energy: bool = True,
        activation: bool = True,
        propagate: bool = True,
        errors: str = "mean",
        drop: float | str = MEASURED,
        shrink: float = SHRINK,
        perturb: str = "rtn",
        gain: bool | None = None,
        seed: int = 0,
    ) -> None:
        if basis_bits not in BASIS_BITS or isinstance(basis_bits, bool):
            raise OptionError(f"{basis_bits!r} cannot be used", option="basis-bits", fix="choose 8 or 16")
        check_choice("basis", basis, BASES)
        check_choice("metric", metric, METRICS)
        check_choice("importance", importance, IMPORTANCES)
        check_choice("errors", errors, ("mean", "exact"))
        check_choice("perturb", perturb, [name for name in QUANTIZERS if not name.startswith("gptq")])
        for option, value in (
            ("joint", joint),
            ("energy", energy),
            ("activation", activation),
            ("propagate", propagate),
        ):
            check_switch(option, value)
        check_number("shrink", shrink)
        if drop != MEASURED:
            check_number("drop", drop, 1.0)
        self.needs = "gradients" if importance == "fisher" and activation else "activations"
        self.basis_bits = basis_bits
        self._basis, self._joint, self._metric = basis, joint, metric
        self._fisher = self.needs == "gradients"
        self._energy, self._activation, self._propagate = energy, activation, propagate
        self._exact = errors == "exact"
        self._drop = None if drop == MEASURED and activation else DROP if drop == MEASURED else float(drop)
        self._shrink = float(shrink)
        self._quantizer = make_quantizer(perturb, **({} if gain is None else {"gain": gain}))
        self._seed = seed
        self._layers: dict[int, _Sums] = {}
        self._pool: SpillPool | None = None

    def keep_bases_in(self, pool: SpillPool) -> None:
        """Bases that are made from now on wait in files of this pool."""
        self._pool = pool

    @property
    def joint(self) -> bool:
        """Whether gate and up share one basis."""
        return self._joint

    @property
    def exact(self) -> bool:
        """Whether costs are each component's own."""
        return self._exact

    def visit(self, view: LayerView, asked: Asked | None) -> None:
        """Add one batch of one layer; see `moeq.costs.base.Cost`.

        Raises:
            OptionError: the experts have no gate.
        """
        assert asked is not None, "needs activations"
        check_gated(view.layer.projections, view.layer.path)
        sums = self._layers.get(view.index)
        if sums is None:
            sums = self._layers[view.index] = _Sums()
            with torch.no_grad():
                self._decompose(view, asked, sums)
        self._listen(view, asked, sums)

    def _decompose(self, view: LayerView, asked: Asked, sums: _Sums) -> None:
        """Bases, energies and errors: what depends on the weights alone (and the inputs, for their metric)."""
        layer, device = view.layer, view.device
        hidden = layer.shapes["down"][0]
        moment_HH = None
        if self._metric == "inputs":
            moment_HH = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
            for chunk in asked.x_TH.split(CHUNK):
                shared_basis.add_gram(moment_HH, chunk.to(device, torch.float32))
            moment_HH = moment_HH.triu().add_(moment_HH.triu(1).T)
        groups = (("gate", "up"), ("down",)) if self._joint else (("gate",), ("up",), ("down",))
        for names in groups:
            basis_HH = self._basis_of(view, names, moment_HH if names[0] != "down" else None)
            stored = self._store(basis_HH)
            inverse_HH = shared_basis.inverse_of(decoded_basis(*stored, view.device))
            for name in names:
                sums.stored[name] = stored
                self._energies(view, name, inverse_HH, sums)
        experts = layer.num_experts
        sums.importance = {name: torch.zeros(experts, hidden, dtype=torch.float64) for name in PROJECTIONS}
        sums.reach = {name: torch.zeros(experts, dtype=torch.float64) for name in ("gate", "up")}
        sums.tokens_E = torch.zeros(experts, dtype=torch.float64)

    def _basis_of(self, view: LayerView, names: tuple[str, ...], moment_HH: Tensor | None) -> Tensor:
        hidden = view.layer.shapes["down"][0]
        if self._basis == "identity":
            return torch.eye(hidden, dtype=torch.float64, device=view.device)
        matrices = (view.read(expert, name) for expert in range(view.layer.num_experts) for name in names)
        gram_HH = shared_basis.gram(matrices, names[0], hidden, view.device)
        return (
            shared_basis.eigenbasis(gram_HH) if moment_HH is None else shared_basis.weighted_basis(gram_HH, moment_HH)
        )

    def _store(self, basis_HH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The basis as it will be stored: rows and scales, on the CPU."""
        spec = basis_spec(self.basis_bits)
        if spec is None:
            return self._kept(basis_HH.half()), None
        rounded = make_quantizer("rtn").quantize(basis_HH.float(), spec, None)
        return self._kept(rounded.codes_NK), rounded.scale_NG

    def _kept(self, rows_HH: Tensor) -> Tensor:
        """The same in a file where there is a pool: bases of all layers wait for the end of the measurement."""
        if self._pool is None:
            return rows_HH.cpu()
        return self._pool.empty(tuple(rows_HH.shape), rows_HH.dtype).copy_(rows_HH)

    def _energies(self, view: LayerView, name: str, inverse_HH: Tensor, sums: _Sums) -> None:
        """Energies of all components of a projection, and what the candidates lose of them."""
        experts, hidden = view.layer.num_experts, len(inverse_HH)
        generator = torch.Generator().manual_seed(self._seed)
        energies, samples, errors = [], [], []
        each = min(hidden, -(-SAMPLED // experts))
        for expert in range(experts):
            p_HI = shared_basis.components(view.read(expert, name), inverse_HH, name)
            energies.append(p_HI.double().square().sum(1).cpu())
            if self._exact:
                errors.append(self._lost(p_HI, view))
            samples.append(p_HI[torch.randperm(hidden, generator=generator)[:each].to(p_HI.device)])
        sums.energy[name] = torch.stack(energies)
        sample_NI = torch.cat(samples)
        square_N = sample_NI.double().square().sum(1).cpu()
        kept_N = square_N > 0
        relative_NC = self._lost(sample_NI, view).double()[kept_N] / square_N[kept_N].unsqueeze(1)
        sums.curve[name] = relative_NC.mean(0) if len(relative_NC) else torch.zeros(len(view.candidates)).double()
        if self._exact:
            sums.errors[name] = torch.stack(errors).float()

    def _lost(self, p_NI: Tensor, view: LayerView) -> Tensor:
        """Squared errors of components at each candidate, (N, C)."""
        lost = []
        for spec in view.candidates:
            rounded = self._quantizer.quantize(p_NI, spec, None)
            lost.append((rounded_weights(rounded, spec) - p_NI.cpu()).square().sum(1))
        return torch.stack(lost, 1)

    def _listen(self, view: LayerView, asked: Asked, sums: _Sums) -> None:
        """Add what a batch of tokens says of the components' importance."""
        order, counts = hooks.by_expert(asked.index_Tk, view.layer.num_experts)
        top_k = asked.index_Tk.shape[-1]
        flat_weights = asked.weights_Tk.reshape(-1)
        sums.asked += len(asked.x_TH)
        sums.tokens_E += torch.tensor(counts, dtype=torch.float64)
        if not self._activation:
            return
        shares = {name: torch.zeros(asked.index_Tk.numel()) for name in PROJECTIONS}
        for expert, chosen in enumerate(order[: sum(counts)].split(counts)):
            if not len(chosen):
                continue
            weights = {name: view.read(expert, name).to(view.device, torch.float32) for name in PROJECTIONS}
            for part in chosen.split(CHUNK):
                rho2_S = flat_weights[part].to(view.device, torch.float32).square_()
                for name, share_S in self._shares(asked, expert, part // top_k, rho2_S, weights, sums).items():
                    shares[name][part] = share_S.cpu()
        for name in PROJECTIONS:
            self._project(view, asked, name, shares[name].view(-1, top_k), sums)

    def _shares(
        self, asked: Asked, expert: int, tokens: Tensor, rho2_S: Tensor, weights: dict[str, Tensor], sums: _Sums
    ) -> dict[str, Tensor]:
        """What some tokens of one expert count for in its importance, beside their projections, (S,)."""
        x_SH = asked.x_TH[tokens].to(rho2_S.device, torch.float32)
        z_SI, products, slopes = _inner(asked, expert, x_SH, weights)
        shares = {"down": rho2_S * z_SI.square().mean(1)}
        if self._fisher:
            assert asked.grad_TH is not None, "needs gradients"
            back_SI = asked.grad_TH[tokens].to(rho2_S.device, torch.float32) @ weights["down"]
            coherence.add(sums.whole, coherence.whole_harms(rho2_S, z_SI, products, slopes, back_SI))
            return shares | {name: (back_SI * slopes[name]).square_().mean(1) * rho2_S for name in ("gate", "up")}
        coherence.add(sums.whole, coherence.whole_answers(rho2_S, z_SI, products, slopes, weights["down"]))
        square_I = weights["down"].square().sum(0)
        for name in ("gate", "up"):
            sums.reach[name][expert] += float((slopes[name].square() * square_I).mean(1).double().sum())
        return shares | dict.fromkeys(("gate", "up"), rho2_S)

    def _project(self, view: LayerView, asked: Asked, name: str, share_Tk: Tensor, sums: _Sums) -> None:
        """Add shares times squared projections to the importance; a token is projected once for all its experts."""
        side_TH = asked.x_TH if name != "down" else asked.grad_TH if self._fisher else None
        basis_HH = None if side_TH is None else decoded_basis(*sums.stored[name], view.device)
        experts = view.layer.num_experts
        for start in range(0, len(share_Tk), CHUNK):
            chunk = slice(start, start + CHUNK)
            # Choices that stand for no expert go to a last column of their own.
            index_Tk = asked.index_Tk[chunk].clamp(max=experts).to(view.device)
            share_TE = torch.zeros(len(index_Tk), experts + 1, device=view.device)
            share_TE = share_TE.scatter_add_(1, index_Tk, share_Tk[chunk].to(view.device))[:, :experts]
            if side_TH is None or basis_HH is None:  # no direction of the output counts more than another
                sums.importance[name] += share_TE.double().sum(0).unsqueeze(1).cpu()
            else:
                square_TH = (side_TH[chunk].to(view.device, torch.float32) @ basis_HH.T).square_()
                sums.importance[name] += (share_TE.T @ square_TH).double().cpu()

    def layers(self) -> Iterator[dict[str, ProjectionCosts]]:
        """The costs of all layers, in order.

        Raises:
            CalibrationError: they are not finite.
        """
        for index in sorted(self._layers):
            sums = self._layers[index]
            yield {name: self._projection(sums, name, index) for name in PROJECTIONS}

    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Routed tokens of each expert, by layer."""
        return tuple(tuple(int(n) for n in self._layers[index].tokens_E) for index in sorted(self._layers))

    def dropping(self) -> tuple[dict[str, float], ...]:
        """Harm of dropping a component in units of its factor: projection -> that, by layer."""
        return tuple(
            {name: self._dropped(self._layers[index], name) for name in PROJECTIONS} for index in sorted(self._layers)
        )

    def _dropped(self, sums: _Sums, name: str) -> float:
        if self._drop is not None:
            return self._drop
        apart_E = (sums.importance[name] * sums.energy[name]).sum(1)
        if not self._fisher and name in sums.reach:
            apart_E = apart_E * sums.reach[name] / sums.tokens_E.clamp(min=1)
        return coherence.coherence(sums.whole[name], float(apart_E.sum()))

    def _projection(self, sums: _Sums, name: str, index: int) -> ProjectionCosts:
        factor_EH = torch.ones_like(sums.energy[name])
        if self._activation:
            factor_EH = self._shrunk(sums.importance[name] / max(1, sums.asked), sums.tokens_E)
            if not self._fisher and self._propagate and name in sums.reach:
                mean_E = sums.reach[name] / sums.tokens_E.clamp(min=1)
                factor_EH = factor_EH * self._shrunk(mean_E.unsqueeze(1), sums.tokens_E, weighted=True)
        weight_EH = factor_EH * sums.energy[name] if self._energy else factor_EH
        if not bool(torch.isfinite(weight_EH.float()).all()):
            raise CalibrationError(
                f"the costs of MoE layer {index} are not finite", fix="use other calibration text, or fewer samples"
            )
        errors = None
        if self._exact:
            errors = (sums.errors[name] * factor_EH.unsqueeze(2)).float()
        rows, scale_HG = sums.stored[name]
        return ProjectionCosts(
            rows=rows,
            scale_HG=scale_HG,
            weight_EH=weight_EH.float(),
            energy_EH=sums.energy[name].float(),
            curve_C=sums.curve[name],
            errors_EHC=errors,
        )

    def _shrunk(self, value_EX: Tensor, tokens_E: Tensor, *, weighted: bool = False) -> Tensor:
        """Values of experts with few tokens, drawn towards the layer's mean (section 3, "Zero bits")."""
        tokens_E1 = tokens_E.unsqueeze(1)
        mean_X = (value_EX * tokens_E1).sum(0) / tokens_E.sum().clamp(min=1) if weighted else value_EX.mean(0)
        return (tokens_E1 * value_EX + self._shrink * mean_X) / (tokens_E1 + self._shrink).clamp(min=1e-9)


def check_gated(projections: tuple[str, ...], path: str) -> None:
    """Raise OptionError unless experts have gate, up and down."""
    if projections != PROJECTIONS:
        raise OptionError(
            f"the experts of {path} have no gate: there is no spectral layout for them",
            option="method",
            fix="choose another method, for example gemq",
        )


def _inner(
    asked: Asked, expert: int, x_SH: Tensor, weights: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the down projection (S, I); products of gate and up; its derivatives with respect to these."""
    with torch.enable_grad():
        products = {name: (x_SH @ weights[name].T).requires_grad_() for name in ("gate", "up")}
        z_SI = hooks.activation(asked.experts, expert, products["gate"], products["up"])
        # Gating is elementwise: the gradient of the sum is each element's derivative.
        slopes = torch.autograd.grad(z_SI.sum(), tuple(products.values()))
    kept = {name: product_SI.detach() for name, product_SI in products.items()}
    return z_SI.detach(), kept, dict(zip(products, slopes, strict=True))
