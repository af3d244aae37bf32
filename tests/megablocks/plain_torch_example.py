"""A stack of dMoE layers with the recurrent router in a plain training loop: each byte of this file from the last."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from rmoe_megablocks import megablocks as rmoe

rmoe.register()  # from here on dMoE(args) and MoE(args) build the router that args name


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm = nn.LayerNorm(args.hidden_size, device=args.device)
        self.moe = rmoe.dMoE(args)

    def forward(self, x, router_state):
        out, router_state, aux_loss = self.moe(self.norm(x), router_state)
        return x + out, router_state, aux_loss


torch.manual_seed(0)
args = rmoe.Arguments(
    hidden_size=64, ffn_hidden_size=64, num_layers=4, moe_num_experts=8, moe_top_k=2, moe_loss_weight=0.01,
    bias=False, fp16=False, moe_router_type="gru", moe_router_rnn_hidden_size=32,
)  # fmt: skip
embed = nn.Embedding(256, args.hidden_size, device=args.device)
nn.init.normal_(embed.weight, std=0.1)
stack = rmoe.RecurrentStack(Block(args) for _ in range(args.num_layers))  # owns the GRU that the layers share
optimizer = torch.optim.AdamW([*embed.parameters(), *stack.parameters()], lr=3e-3)
text = torch.tensor(list(Path(__file__).read_bytes()), device=args.device)

losses = []
for _ in range(60):
    start = torch.randint(len(text) - 33, (8,)).tolist()
    tokens = torch.stack([text[i : i + 33] for i in start], dim=1)  # [S + 1, B]
    x, aux_loss = stack(embed(tokens[:-1]))
    loss = F.cross_entropy((x @ embed.weight.T).flatten(0, 1), tokens[1:].flatten())
    optimizer.zero_grad()
    (loss + aux_loss).backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
