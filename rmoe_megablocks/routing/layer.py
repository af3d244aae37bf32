"""What every MoE layer owns of a recurrent router: its projector and its router matrix."""

import torch
from torch import Tensor, nn

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.initialisation import FAN_IN, fan_in_


class LayerRouting(nn.Module):
    """Projector (Eq. 4) and router (Eq. 6) of one layer around the shared recurrence.

    Parameters: projector [P, H], router [E, P] and, with ``config.bias``, projector_bias [P], router_bias [E].
    They belong to this module itself rather than to nn.Linear children: Megatron waits for a module's gathered
    parameters when that module is called, and only this one is.
    """

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self._config = config
        self.projector = nn.Parameter(torch.empty(config.state_size, config.hidden_size))
        self.router = nn.Parameter(torch.empty(config.num_experts, config.state_size))
        self.projector_bias = nn.Parameter(torch.empty(config.state_size)) if config.bias else None
        self.router_bias = nn.Parameter(torch.empty(config.num_experts)) if config.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws matrices and biases anew by ``layer_init`` of the :class:`RoutingConfig`."""
        if self._config.layer_init == FAN_IN:
            fan_in_(self.projector, self.projector_bias)
            fan_in_(self.router, self.router_bias)
            return
        self._config.init_method(self.projector)
        self._config.init_method(self.router)
        for bias in (self.projector_bias, self.router_bias):
            if bias is not None:
                bias.zero_()

    def forward(
        self, x_TH: Tensor, h_TP: Tensor | None, cell: nn.Module, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and next state of this layer.

        Args:
            x_TH: hidden states [..., H]; leading dimensions are tokens, each on its own.
            h_TP: state of the previous MoE layer [..., P], None for h_0 = 0.
            cell: the shared recurrence, ``cell(p_TP, h_TP) -> h_TP``.
            dtype: arithmetic and result dtype, default that of ``x_TH``. The weights may have another one.

        Returns:
            logits_TE [..., E] and h_TP [..., P], both in ``dtype``.

        Raises:
            ValueError: a width, tokens, a dtype or a device that do not belong together.
        """
        dtype = dtype or x_TH.dtype
        if x_TH.shape[-1:] != self.projector.shape[1:]:
            expected = self.projector.shape[1]
            raise ValueError(f"hidden states must be [..., {expected}] for this router, got {list(x_TH.shape)}")
        p_TP = linear_in_dtype(x_TH, self.projector, self.projector_bias, dtype)
        if h_TP is not None:
            _check_state(h_TP, p_TP)
        h_TP = cell(p_TP, h_TP)
        return linear_in_dtype(h_TP, self.router, self.router_bias, dtype), h_TP


def _check_state(h_TP: Tensor, p_TP: Tensor) -> None:
    """Raises ValueError for the state of other tokens or another model: broadcasting would hide it."""
    for what, found, expected in (
        ("shape", list(h_TP.shape), list(p_TP.shape)),
        ("dtype", h_TP.dtype, p_TP.dtype),
        ("device", h_TP.device, p_TP.device),
    ):
        if found != expected:
            raise ValueError(f"the routing state must be None or of {what} {expected}, got {found}")
