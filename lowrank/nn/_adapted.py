"""What the layers of this package have in common: a frozen linear, read as nn.Linear is, and a merged weight beside it."""

from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """``base_layer``, frozen, under something that trains.

    Args: ``base`` to adopt, or nn.Linear's own.
    """

    base_layer: nn.Linear  # or a module that is like one
    _merged_weight: Tensor | None

    def __init__(self, in_features: int, out_features: int, base: nn.Module | None, bias: bool, device, dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.base_layer = base or nn.Linear(in_features, out_features, bias, device, dtype)  # type: ignore[assignment]  # that module
        self.base_layer.requires_grad_(False)
        self.register_buffer("_merged_weight", None, persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight, in its own layout: always the pristine one, merged or not."""
        return self.base_layer.weight  # type: ignore[return-value]  # which nn.Linear declares a Tensor

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether forward uses one merged weight."""
        return self._merged_weight is not None

    def unmerge(self) -> None:
        """Forget the merged weight."""
        self._merged_weight = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unmerge()  # what is merged belongs to the parameters that are about to be replaced
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What nn.Linear prints."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def refuse_base_options(options: dict) -> None:
    """Raise TypeError for what from_linear's base has already."""
    if names := options.keys() & {"bias", "device", "dtype"}:
        raise TypeError(f"from_linear: the base has its own {', '.join(sorted(names))}")
