"""Activations that keep lengths of gradients: their Jacobian is orthogonal everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from householder.maps import HouseholderProduct
from householder.nn._checks import check_positive_int


class MaxMin(nn.Module):
    """Order each pair of neighbouring channels: (a, b) becomes (max(a, b), min(a, b)).

    The Jacobian is a permutation everywhere, also where a = b (there it is the identity): all
    singular values are exactly 1. The gradients of PyTorch's max and min do not have that property
    at ties: they send both to one of the two, or half of each to both.

    Args:
        dim: of the channels; channels 2i and 2i + 1 are a pair.

    Raises:
        ValueError: in `forward`, the number of channels is odd.

    Gradients:
        Every order (of a piecewise linear function).

    Examples:
        >>> MaxMin()(torch.tensor([1.0, 2.0, 5.0, -3.0]))
        tensor([ 2.,  1.,  5., -3.])

    References:
        - Sorting out Lipschitz Function Approximation (Anil, Lucas, Grosse, 2019),
          https://arxiv.org/abs/1811.05381
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like `x [..., C, ...]` with its pairs ordered."""
        groups, axis = _split_groups("MaxMin", x, self.dim, 2)
        a, b = groups.unbind(axis)
        keep = a >= b
        ordered = torch.stack([torch.where(keep, a, b), torch.where(keep, b, a)], dim=axis)
        return ordered.flatten(axis - 1, axis)

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return f"dim={self.dim}"


class GroupSort(nn.Module):
    """Sort each group of neighbouring channels in ascending order.

    The Jacobian is a permutation everywhere, ties included (their order is kept): all singular
    values are exactly 1. `MaxMin` is a group of 2 in the other order.

    Args:
        group_size: channels of a group; `None` for all channels.
        dim: of the channels.

    Raises:
        TypeError: `group_size` is no int.
        ValueError: `group_size` is less than 1; in `forward`, it does not divide the channels.

    Gradients:
        Every order (of a piecewise linear function).

    Examples:
        >>> GroupSort(4)(torch.tensor([3.0, 1.0, 2.0, 0.0, 7.0, 7.0, 5.0, 6.0]))
        tensor([0., 1., 2., 3., 5., 6., 7., 7.])

    References:
        - Sorting out Lipschitz Function Approximation (Anil, Lucas, Grosse, 2019),
          https://arxiv.org/abs/1811.05381
    """

    def __init__(self, group_size: int | None = None, dim: int = -1) -> None:
        super().__init__()
        if group_size is not None:
            check_positive_int("GroupSort", "group_size", group_size)
        self.group_size = group_size
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like `x [..., C, ...]` with its groups sorted."""
        size = x.shape[self.dim] if self.group_size is None else self.group_size
        groups, axis = _split_groups("GroupSort", x, self.dim, size)
        return groups.sort(dim=axis, stable=True).values.flatten(axis - 1, axis)

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return f"group_size={self.group_size}, dim={self.dim}"


class HouseholderActivation(nn.Module):
    """Reflect each group of channels on the wrong side of a learnable mirror.

    For a group z and its vector v: z if vᵀz ≥ 0, else H z with H = I − 2 v vᵀ / ‖v‖². Both pieces
    agree on the mirror vᵀz = 0, so it is continuous, and the Jacobian is I or H: all singular
    values are 1, to the rounding of H. With v = (1, −1) it is `MaxMin`, where groups of 2 start.
    Only the direction of v matters; v = 0 is the identity.

    Args:
        channels: C.
        group_size: channels of a group, neighbours; it divides C.
        dim: of the channels.
        device: of the parameter.
        dtype: of the parameter.

    Attributes:
        reflectors: parameter `[C / group_size, group_size]`, the vectors v. Groups of 2 start at
            (1, −1)/√2, larger ones at random unit vectors.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is less than 1, `group_size` does not divide C, or in `forward` x has
            another number of channels.

    Gradients:
        Every order (piecewise smooth). On the mirror itself the Jacobian is taken to be I.

    Examples:
        >>> x = torch.randn(8, 6, 5, 5)
        >>> act = HouseholderActivation(6, dim=1)
        >>> torch.allclose(act(x), MaxMin(dim=1)(x), atol=1e-6)
        True

    References:
        - Improved Deterministic l2 Robustness on CIFAR-10 and CIFAR-100 (Singla, Singla, Feizi,
          2021), https://arxiv.org/abs/2108.04062
    """

    def __init__(
        self,
        channels: int,
        group_size: int = 2,
        dim: int = -1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_positive_int(where, "channels", channels)
        check_positive_int(where, "group_size", group_size)
        if channels % group_size:
            raise ValueError(
                f"{where}: `group_size` must divide `channels`, got {group_size} and {channels}; "
                "change one of them"
            )
        self.dim = dim
        self.reflectors = nn.Parameter(
            torch.empty(channels // group_size, group_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set groups of 2 to (1, −1)/√2, and draw larger ones from the unit sphere."""
        with torch.no_grad():
            if self.reflectors.shape[1] == 2:
                start = torch.tensor([0.5**0.5, -(0.5**0.5)])
                self.reflectors.copy_(start.expand_as(self.reflectors))
                return
            drawn = torch.empty_like(self.reflectors, dtype=torch.float32).normal_()
            self.reflectors.copy_(nn.functional.normalize(drawn, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like `x [..., C, ...]`, each group on its mirror's positive side."""
        count, size = self.reflectors.shape
        groups, axis = _split_groups("HouseholderActivation", x, self.dim, size)
        if groups.shape[axis - 1] != count:
            raise ValueError(
                f"HouseholderActivation: `x` must have {count * size} channels in dimension "
                f"{self.dim}, got shape {list(x.shape)}; `dim` names the dimension of the channels"
            )
        mirrors = HouseholderProduct.orthogonal(self.reflectors.unsqueeze(-2))
        # In float32 at least, as beta is.
        wide = groups.to(torch.promote_types(groups.dtype, mirrors.beta.dtype))
        trailing = (1,) * (groups.dim() - axis - 1)
        v = mirrors.reflectors.to(wide.dtype).reshape(count, size, *trailing)
        beta = mirrors.beta.reshape(count, 1, *trailing)
        behind = torch.relu(-(wide * v).sum(axis, keepdim=True))
        return (wide + beta * behind * v).to(x.dtype).flatten(axis - 1, axis)

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        count, size = self.reflectors.shape
        return f"{count * size}, group_size={size}, dim={self.dim}"


def _split_groups(where: str, x: Tensor, dim: int, size: int) -> tuple[Tensor, int]:
    """Split the channels into `[..., C / size, size, ...]`; also return the axis of a group."""
    channels = x.shape[dim]
    if channels % size:
        raise ValueError(
            f"{where}: groups of {size} must divide the channels, got {channels} of them in "
            f"dimension {dim} of shape {list(x.shape)}; `dim` names the dimension of the channels"
        )
    return x.unflatten(dim, (channels // size, size)), dim % x.dim() + 1
