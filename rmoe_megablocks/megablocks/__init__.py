"""The router types of this package in MegaBlocks' own layers, for models without Megatron-Core.

``dMoE(args)`` and ``MoE(args)`` build the router that the arguments name::

    import torch
    from rmoe_megablocks import megablocks as rmoe

    args = rmoe.Arguments(
        hidden_size=64,
        ffn_hidden_size=128,
        num_layers=4,
        moe_num_experts=8,
        moe_top_k=2,
        bias=False,
        fp16=False,
        moe_router_type="gru",
    )
    layers = torch.nn.ModuleList(rmoe.dMoE(args) for _ in range(4))
    recurrence = rmoe.share_recurrence(layers)  # one module for all layers: register it in the model

    x, router_state, aux_loss = torch.randn(16, 2, 64, device=args.device), None, 0
    for layer in layers:
        out, router_state, layer_loss = layer(x, router_state)
        x, aux_loss = x + out, aux_loss + layer_loss

or let :class:`RecurrentStack` own the recurrence and hand the state on. Every type of
:func:`rmoe_megablocks.routing.router_types` works so, with its arguments in ``moe_router_options``, and one of yours as
``module:Class``. Where layers hand nothing on, ``router_state`` stays None, and where they share nothing
:func:`share_recurrence` returns None and may be left out. With ``moe_router_type="linear"`` the layers are MegaBlocks'
own, to the bit and with their own signature.

``rmoe.dMoE`` and ``rmoe.MoE`` are MegaBlocks' classes, wherever they are imported from. Importing this package before
anything imports MegaBlocks makes MegaBlocks run here, see :mod:`rmoe_megablocks.compat.megablocks`; ``.router`` and
``.layer`` are what it adds, ``.losses`` tells why losses are returned.
"""

from rmoe_megablocks.compat import megablocks as _compat

_compat.enable()

from megablocks import MoE, dMoE  # noqa: E402

from rmoe_megablocks.megablocks.arguments import Arguments  # noqa: E402
from rmoe_megablocks.megablocks.layer import register  # noqa: E402
from rmoe_megablocks.megablocks.stack import RecurrentStack, share_recurrence  # noqa: E402

__all__ = ["Arguments", "MoE", "RecurrentStack", "dMoE", "register", "share_recurrence"]
