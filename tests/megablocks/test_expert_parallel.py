"""dMoE with the GRU router on two expert parallel ranks against one process with all experts."""

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

WORLD = 2


def build(expert_parallel):
    from rmoe_megablocks import megablocks as rmoe

    rmoe.register()
    torch.manual_seed(0)
    args = rmoe.Arguments(
        hidden_size=16,
        ffn_hidden_size=24,
        num_layers=2,
        moe_num_experts=8,
        moe_top_k=2,
        moe_expert_model_parallelism=expert_parallel,
        mlp_type="glu",
        bias=False,
        fp16=False,
        moe_router_type="gru",
        moe_router_rnn_hidden_size=12,
    )
    return rmoe.RecurrentStack(rmoe.dMoE(args) for _ in range(2))


def train(stack, x):
    out, aux_loss = stack(x)
    (out.square().sum() * 1e6 + aux_loss).backward()
    return out.detach(), {name: p.grad for name, p in stack.named_parameters()}


def worker(rank, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    x = torch.randn(WORLD, 6, 2, 16, generator=torch.Generator().manual_seed(1))
    torch.save(train(build(True), x[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=WORLD)
    stack = build(False)
    x = torch.randn(WORLD, 6, 2, 16, generator=torch.Generator().manual_seed(1))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    expected = {}
    for rank in range(WORLD):
        out, grads = train(stack, x[rank])
        torch.testing.assert_close(parts[rank][0], out, rtol=1e-5, atol=1e-9)
        expected = {name: grad.clone() for name, grad in grads.items()}  # sums over ranks: not zeroed in between
    for name, grad in expected.items():
        if ".experts." in name:  # MegaBlocks averages: its ranks hold the experts of one data parallel group
            ours = torch.cat([part[1][name] for part in parts]) * WORLD
        else:
            ours = sum(part[1][name] for part in parts)
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
