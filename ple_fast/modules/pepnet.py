"""PEPNet (Chang et al., KDD 2023, arXiv 2302.01115): what is known of a row beforehand scales embeddings and towers.

The equation numbers are those of the paper. Public implementations scale the outputs of a tower's hidden layers alone;
equation 9 scales what each layer reads, and so its first input too, which is followed here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import scaled
from ..scalars import as_tuple, check_count, check_counts, check_number, is_sequence, shown
from ..specs import GateSpec, MLPSpec
from ..topology import Topology
from .network import ExtractionNetwork


class GateNU(nn.Module):
    """Gate neural units that read one prior: ``factor sigmoid(relu(x W + b) W' + b')`` (eq. 2-3), of which ``forward``
    gives the sigmoid and ``scale`` applies the whole.

    They are the experts of one level, so any number of units costs as many launches as one.

    Args:
        in_features: width of the prior.
        out_features: width of what each unit scales.
        count: units.
        hidden_units: width of their hidden layer; None: ``out_features``.
        factor: of the sigmoid; the paper's gamma.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        count: int = 1,
        hidden_units: int | None = None,
        factor: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        count, self.factor = check_count("count", count), check_number("factor", factor)
        out_features = check_count("out_features", out_features)
        hidden = out_features if hidden_units is None else check_count("hidden_units", hidden_units)
        self.level = ExtractionNetwork(
            in_features,
            Topology.single_task(count),
            experts=MLPSpec((hidden, out_features), last_activation="sigmoid"),
            gate=GateSpec(),
            device=device,
            dtype=dtype,
        )

    def forward(self, prior: Tensor) -> Tensor:
        """``(B, P)`` to ``(B, count, out_features)``, from 0 to 1."""
        sigmoids: Tensor = self.level(prior)
        return sigmoids

    def scale(self, x: Tensor, prior: Tensor) -> Tensor:
        """``x (B, count, D)``, or ``(B, D)`` for every unit, scaled: ``(B, count, D)``."""
        return scaled(x, self(prior), factor=self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class EPNet(nn.Module):
    """Embeddings scaled by what is known of a row's domain (eq. 5-6): ``2 U(d (+) stop(e)) * e``.

    The gate reads the embeddings too, and no gradient goes back by that way.

    Args:
        in_features: width ``F`` of the embeddings.
        domain_features: width of the domain's embeddings.
        hidden_units: width of the gate's hidden layer; None: ``in_features``.
        factor: of the sigmoid.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        domain_features: int,
        *,
        hidden_units: int | None = None,
        factor: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, domain = check_count("in_features", in_features), check_count("domain_features", domain_features)
        self.gate = GateNU(
            domain + in_features, in_features, hidden_units=hidden_units, factor=factor, device=device, dtype=dtype
        )

    def forward(self, embeddings: Tensor, domain: Tensor) -> Tensor:
        """``(B, F)`` and ``(B, domain_features)`` to ``(B, F)``."""
        return self.gate.scale(embeddings, torch.cat([domain, embeddings.detach()], 1)).squeeze(1)


class PPNet(nn.Module):
    """Gates that scale what each layer of each task's tower reads (eq. 7-9): ``2 U(p (+) stop(e)) * h``.

    Args:
        in_features: width ``F`` of the embeddings (those that EPNet has scaled, where there is one).
        personal_features: width of the embeddings of user and item.
        num_tasks: towers ``T``.
        tower_features: what each layer of a tower reads, first to last: the width of the trunk's mixtures, then those
            of the hidden layers.
        hidden_units: width of the gates' hidden layers; None: that of what each scales.
        factor: of the sigmoid.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        personal_features: int,
        num_tasks: int,
        tower_features: Sequence[int],
        *,
        hidden_units: int | None = None,
        factor: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_sequence(tower_features) or not as_tuple(tower_features):
            raise TypeError(
                f"tower_features: expected the widths that a tower's layers read, such as (128, 64), got "
                f"{shown(tower_features)}"
            )
        self.factor = check_number("factor", factor)
        width = check_count("in_features", in_features) + check_count("personal_features", personal_features)
        self.gates = nn.ModuleList(
            GateNU(
                width, features, count=num_tasks, hidden_units=hidden_units, factor=factor, device=device, dtype=dtype
            )
            for features in check_counts("tower_features", tower_features)
        )

    def forward(self, embeddings: Tensor, personal: Tensor) -> list[Tensor]:
        """``(B, F)`` and ``(B, personal_features)`` to the sigmoids of each layer, ``(B, T, D_layer)``."""
        prior = torch.cat([personal, embeddings.detach()], 1)
        return [gate(prior) for gate in self.gates]
