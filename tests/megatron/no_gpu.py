"""What Megatron asks of a GPU beside its tensors, where there is none; and no CPU mode. Imported before Megatron."""

import contextlib
import os

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # Megatron's fusions, compiled when they are first called

import torch  # noqa: E402

from rmoe_megablocks.compat import megatron_cpu  # noqa: E402
from rmoe_megablocks.compat.megatron_cpu.device import Event, Stream  # noqa: E402

megatron_cpu.needed = lambda: False
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.current_stream = lambda device=None: Stream()
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.cuda.synchronize = lambda device=None: None
torch.cuda.Stream, torch.cuda.Event = Stream, Event
torch.Tensor.record_stream = lambda self, stream: None
