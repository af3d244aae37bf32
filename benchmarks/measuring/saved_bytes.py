"""How much memory a forward pass keeps for its backward pass."""

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedBytes:
    """Around a forward pass: what autograd saves in it, by ``saved_tensors_hooks``, each storage counted once.

    A view counts as the whole storage that it keeps alive. Storages are held until the end, so that none is freed and
    another counted in its place.

    Args:
        left_out: tensors whose storages do not count, as parameters and inputs.
    """

    def __init__(self, left_out: Iterable[Tensor] = ()) -> None:
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor that something else than autograd keeps."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._left_out:
            self._kept[storage._cdata] = storage

    @property
    def total(self) -> int:
        """Bytes of all storages so far."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        # a result that its own graph holds would never be freed; a leaf stays what it is, with what hangs on it
        return tensor if tensor.grad_fn is None else tensor.detach()
