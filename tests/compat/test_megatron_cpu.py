"""CPU mode: what it answers in the place of CUDA, its random state, its optimizer, and when it refuses."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron_cpu import distributed

pytestmark = pytest.mark.skipif(not megatron_cpu.needed(), reason="CPU mode is for machines without a GPU")


@pytest.fixture(scope="module", autouse=True)
def cpu_mode():
    if not megatron_cpu.active():
        megatron_cpu.install()


def run_python(code, **environment):
    """Run code in a fresh interpreter and return what it printed."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_WORLD_SIZE", megatron_cpu._MARK)
    }
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env | environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Installing


def test_installed_once_and_announced_once():
    code = """
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron_cpu import distributed
assert not megatron_cpu.active()
assert megatron_cpu.install() and megatron_cpu.install() and megatron_cpu.active()
import torch
assert torch.cuda.is_available() and megatron_cpu.needed()
"""
    lines = run_python(code).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("CPU mode")


def test_other_ranks_are_silent():
    assert run_python("from rmoe_megablocks.compat import megatron_cpu; megatron_cpu.install()", RANK="1") == ""


def test_refused_after_megatron_was_imported():
    code = """
import sys, types
sys.modules["megatron"] = types.ModuleType("megatron")
import torch
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron_cpu import distributed
try:
    megatron_cpu.install()
except RuntimeError as error:
    print(error)
assert not megatron_cpu.active() and not torch.cuda.is_available()
"""
    assert "before the first import of megatron" in run_python(code)


def test_does_nothing_where_there_is_a_gpu():
    code = """
import torch
torch.cuda.is_available = lambda: True
empty, current_device = torch.empty, torch.cuda.current_device
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron_cpu import distributed
assert not megatron_cpu.needed() and not megatron_cpu.install() and not megatron_cpu.active()
assert torch.empty is empty and torch.cuda.current_device is current_device
import sys
assert "megatron.core" not in sys.modules
print("untouched")
"""
    assert run_python(code) == "untouched\n"


def test_arguments_are_known_to_megatron():
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(list(megatron_cpu.ARGUMENTS))
    assert args.distributed_backend == "gloo"
    assert args.transformer_impl == "local"


# Devices


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda"), torch.device("cuda", 3), "cpu", None])
def test_cuda_devices_mean_the_cpu(device):
    x = torch.ones(2, 3)
    made = [
        torch.empty(2, device=device),
        torch.zeros(2, device=device),
        torch.full((2,), 1.0, device=device),
        torch.tensor([1, 2], device=device),
        torch.arange(3, device=device),
        torch.randn(2, device=device, pin_memory=True),
        torch.empty_like(x, device=device),
        x.new_zeros(2, device=device),
        x.to(device=device),
        x.cuda(),
        x.pin_memory(),
    ]
    if device is not None:
        made += [x.to(device), x.to(device, torch.bfloat16), torch.nn.Linear(2, 2).to(device).weight]
    made.append(torch.nn.Linear(2, 2).cuda().weight)
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_other_devices_are_kept():
    assert torch.empty(2, device="meta").is_meta
    assert torch.ones(2).to("meta").is_meta
    with torch.device("meta"):
        assert torch.zeros(2).is_meta


def test_to_keeps_its_other_meanings():
    x = torch.ones(2)
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(dtype=torch.float16).dtype == torch.float16
    assert x.to(torch.zeros(1, dtype=torch.int64)).dtype == torch.int64
    assert x.to("cuda", copy=True).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", ["Float", "Half", "BFloat16"])
def test_type_names_are_those_of_cuda(name):
    dtype = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}[name]
    x = torch.ones(1, dtype=dtype)
    assert x.type() == f"torch.cuda.{name}Tensor"
    assert torch.ones(1, dtype=torch.float64).type(x.type()).dtype == dtype
    assert torch.ones(1).type(dtype).dtype == dtype
    assert isinstance(x, getattr(torch.cuda, f"{name}Tensor"))


def test_cuda_answers(monkeypatch):
    assert torch.cuda.is_available() and not torch.accelerator.is_available()
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert torch.cuda.device_count() == 3
    assert torch.cuda.get_device_properties(0).total_memory > torch.cuda.max_memory_allocated() > 0
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    end.record()
    torch.cuda.synchronize()
    assert 0 <= start.elapsed_time(end) < 1000


# Random state


@pytest.fixture
def tracker():
    from megatron.core.tensor_parallel import random

    random.model_parallel_cuda_manual_seed(123, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    return random.get_cuda_rng_tracker()


def test_cuda_and_cpu_generators_are_one():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    assert torch.equal(state, torch.get_rng_state())
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4, device="cuda"))
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator


def test_tracker_forks(tracker, caplog):
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    assert torch.equal(before, torch.get_rng_state())
    with tracker.fork():
        second = torch.rand(4)
    with tracker.fork("expert-parallel-rng"):
        other = torch.rand(4)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert "CPU RNG state changed" not in caplog.text
    tracker_again = [tensor.clone() for tensor in (first, second)]
    from megatron.core.tensor_parallel import random

    random.model_parallel_cuda_manual_seed(123, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    with random.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(8), torch.cat(tracker_again))


def test_recomputation_restores_dropout(tracker):
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 16, generator=generator)
    data = torch.randn(8, 16, generator=generator)

    def layer(x, w):
        # Dropout inside and outside of the tensor-parallel region, as in attention and after it.
        with random.get_cuda_rng_tracker().fork():
            x = torch.nn.functional.dropout(x @ w, 0.1)
        return torch.nn.functional.dropout(torch.tanh(x), 0.1)

    def run(recompute):
        random.model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
        w, x = weight.clone().requires_grad_(), data.clone().requires_grad_()
        hidden = x
        for _ in range(3):
            hidden = tensor_parallel.checkpoint(layer, False, hidden, w) if recompute else layer(hidden, w)
        hidden.square().sum().backward()
        return hidden.detach(), w.grad, x.grad, torch.get_rng_state(), random.get_cuda_rng_tracker().get_states()

    *plain, plain_states = run(recompute=False)
    *recomputed, recomputed_states = run(recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert plain_states.keys() == recomputed_states.keys()
    assert all(torch.equal(plain_states[name], recomputed_states[name]) for name in plain_states)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loaders_leave_the_random_state_alone(workers):
    before = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=2, num_workers=workers, pin_memory=True)
    assert torch.cat(list(loader)).tolist() == list(range(8))
    assert torch.equal(before, torch.get_rng_state())


# Places of Megatron


def test_moved_splits_are_arrays():
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    assert token_dispatcher.maybe_move_tensor_to_cpu is moe_utils.maybe_move_tensor_to_cpu
    assert moe_utils.maybe_move_tensor_to_cpu(torch.arange(3), as_numpy=True).tolist() == [0, 1, 2]
    assert moe_utils.maybe_move_tensor_to_cpu(torch.arange(3)).tolist() == [0, 1, 2]
    assert moe_utils.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_its_weights_for_sequence_parallelism(sequence_parallel):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
    config.sequence_parallel = sequence_parallel
    norm = WrappedTorchNorm(config, 8)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert getattr(norm.weight, "sequence_parallel", False) == sequence_parallel
    assert config.sequence_parallel == sequence_parallel


def test_checkpoint_writer_gets_copies():
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    weight = torch.ones(3)
    [(file_name, key, (bytes_data, [(item, staged)]))] = FileSystemWriterAsync.preload_tensors(
        [("file", "key", ([], [("item", weight)]))]
    )
    weight.zero_()
    assert (file_name, key, bytes_data, item) == ("file", "key", [], "item")
    assert staged.tolist() == [1.0, 1.0, 1.0]


def test_results_of_checkpoint_writers_are_held_by_a_fork(monkeypatch):
    """Also behind what a run puts in that function's place; a spawned process imports everything again, for seconds."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from rmoe_megablocks.compat.megatron import checkpoints as megatron_checkpoints

    for name in ("_results_queue", "get_write_results_queue"):
        monkeypatch.setattr(filesystem_async, name, getattr(filesystem_async, name))
    filesystem_async._results_queue = None
    megatron_checkpoints.end_result_servers_with_their_rank()
    others = set(multiprocessing.active_children())
    queue = filesystem_async.get_write_results_queue()
    (server,) = set(multiprocessing.active_children()) - others
    assert isinstance(server, multiprocessing.get_context("fork").Process)
    assert filesystem_async.get_write_results_queue() is queue


# Process groups


def test_nccl_means_gloo():
    wrapped = distributed._on_gloo(lambda *args, **kwargs: (args, kwargs))
    assert wrapped(backend="nccl", pg_options=object(), device_id=object(), rank=0) == (
        (),
        {"backend": "gloo", "rank": 0},
    )
    assert wrapped([0, 1], None, "cpu:gloo,cuda:nccl") == (([0, 1], None, "gloo"), {})
    assert wrapped(backend="fake") == ((), {"backend": "fake"})


def test_memory_of_a_send_outlives_the_tensor():
    class Request:
        completed = False

        def is_completed(self):
            return self.completed

    sent = []

    def send(tensor, destination):
        sent.append(tensor)
        return Request()

    wrapped = distributed._keeping_memory(send)
    before = len(distributed._in_flight)
    tensor = torch.ones(4, requires_grad=True) * 2
    request = wrapped(tensor, 1)
    tensor.data = torch.empty(1)  # what deallocate_output_tensor does
    assert sent[0].tolist() == [2.0] * 4
    assert len(distributed._in_flight) == before + 1
    request.completed = True
    wrapped(torch.ones(1), 1).completed = True
    assert all(entry[0] is not request for entry in distributed._in_flight)


def test_torch_compares_the_same_send_and_receive():
    # batch_isend_irecv tells sends from receives by identity.
    c10d = torch.distributed.distributed_c10d
    assert torch.distributed.isend is c10d.isend
    assert torch.distributed.irecv is c10d.irecv


def test_collectives_are_over_when_they_return():
    class Work(torch.distributed.Work):
        waited = 0

        def wait(self, timeout=None):
            self.waited += 1
            return True

    work = Work()
    handle = distributed._waiting(lambda: work)()
    assert work.waited == 1
    assert handle.is_completed() and handle.wait()
    assert work.waited == 1
    assert distributed._waiting(lambda: None)() is None
    placeholder = torch.distributed.distributed_c10d._IllegalWork()
    assert distributed._waiting(lambda: placeholder)() is placeholder
