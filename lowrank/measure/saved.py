"""Bytes that autograd keeps for backward, and bytes of tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class SavedActivations:
    """Context manager: .bytes of the distinct storages saved for backward in it, those of ``own`` not counted.

    A storage is known by its address, which is not used again while autograd keeps the tensor.  ``hold``: keep a tensor of
    each as well (.tensors), to look at, or where a graph may be gone before the count is complete; on the meta device that
    costs nothing.
    """

    def __init__(self, own: Iterable[Tensor], hold: bool = False):
        self._own = {t.untyped_storage()._cdata for t in own}
        self._hold = hold
        self._bytes: dict[int, int] = {}
        self._held: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._bytes[storage._cdata] = storage.nbytes()
            if self._hold:
                self._held[storage._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._bytes.values())

    @property
    def tensors(self) -> list[Tensor]:
        """One per storage, if they are held."""
        return list(self._held.values())

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
