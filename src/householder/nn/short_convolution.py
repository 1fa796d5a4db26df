"""A short causal convolution along the tokens, one kernel per channel, its state in the open."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from householder.nn._checks import check_positive_int, check_sequences, check_state_tensor
from householder.nn.initialization import init_weight
from householder.ops.short_convolution import short_convolution, short_convolution_step_


class ShortConvolution(nn.Module):
    """Convolve each channel over its own recent past: y_t = Σ_i weight_i · x_{t − W + 1 + i}.

    What came before the first token is the state: the last W − 1 inputs, or zeros.

    Args:
        channels: D.
        kernel_size: W, how many tokens an output sees, itself included.
        init_std: standard deviation of the initial weights; `None` for U(−1/√W, 1/√W).
        device: of the parameter.
        dtype: of the parameter.

    Examples:
        >>> conv = ShortConvolution(8, kernel_size=4)
        >>> x = torch.randn(2, 6, 8)
        >>> whole, _ = conv(x)
        >>> first, state = conv(x[:, :5])
        >>> last, state = conv(x[:, 5:], state)
        >>> torch.equal(whole, torch.cat([first, last], dim=1))
        True
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 4,
        *,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("ShortConvolution", "channels", channels)
        check_positive_int("ShortConvolution", "kernel_size", kernel_size)
        self.channels = channels
        self.kernel_size = kernel_size
        self.init_std = init_std
        # The layout of a depthwise torch.nn.Conv1d, which published checkpoints use too.
        self.weight = nn.Parameter(
            torch.empty(channels, 1, kernel_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew from PyTorch's global generator."""
        init_weight(self.weight, self.init_std)

    def init_state(self, batch_size: int) -> Tensor:
        """Return the state before the first token: zeros `[B, W − 1, D]`."""
        return self.weight.new_zeros(batch_size, self.kernel_size - 1, self.channels)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        silu: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Convolve whole sequences, or continue them from a state.

        Args:
            x: `[B, T, D]`; with `cu_seqlens`, `[1, T, D]` holding S sequences end to end.
            state: the last W − 1 inputs of each sequence, `[B, W − 1, D]` (`[S, W − 1, D]` with
                `cu_seqlens`); `None` for zeros. Not changed.
            cu_seqlens: int32 `[S + 1]`, where the packed sequences begin and end.
            silu: apply SiLU to the result, in the same kernel where there is one.

        Returns:
            y: `[B, T, D]` in the dtype of `x`.
            new_state: shaped as `state`, in the dtype of `x`.

        Raises:
            ValueError: a shape or `cu_seqlens` does not fit.
        """
        num_sequences = check_sequences("ShortConvolution", x, self.channels, cu_seqlens)
        if state is not None:
            shape = (num_sequences, self.kernel_size - 1, self.channels)
            check_state_tensor("ShortConvolution", "state", state, shape)
        if cu_seqlens is not None:
            return self._forward_packed(x, state, cu_seqlens, silu)
        y = short_convolution(x, self.weight, state, silu=silu)
        past = self.kernel_size - 1
        if x.shape[1] >= past:
            # A copy: a view would keep the whole sequence alive for as long as the state.
            return y, x[:, x.shape[1] - past :].clone()
        history = self.init_state(x.shape[0]) if state is None else state
        return y, torch.cat([history.to(x.dtype), x], dim=1)[:, x.shape[1] :]

    def step_(self, x: Tensor, state: Tensor, *, silu: bool = False) -> Tensor:
        """Convolve one more token and move the state on by it in place, without gradients.

        Args:
            x: `[B, D]`.
            state: the last W − 1 inputs `[B, W − 1, D]`, contiguous.
            silu: as in `forward`.

        Returns:
            y: `[B, D]`.

        Raises:
            ValueError: a shape does not fit.
            NotImplementedError: gradients are on.
        """
        return short_convolution_step_(x, self.weight, state, silu=silu)

    def extra_repr(self) -> str:
        """Return the sizes that `print` shows."""
        return f"{self.channels}, kernel_size={self.kernel_size}"

    def _forward_packed(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor, silu: bool
    ) -> tuple[Tensor, Tensor]:
        # Each sequence gets its own history in front, so that one plain convolution over the
        # extended row never reaches across a border, however short or empty the sequences are. The
        # new states come from there too.
        num_sequences, T = cu_seqlens.numel() - 1, x.shape[1]
        past = self.kernel_size - 1
        token = torch.arange(T, device=x.device, dtype=cu_seqlens.dtype)
        # In all of cu_seqlens, and not in a slice of it: see ops/short_convolution/api.py.
        bounds_so_far = torch.searchsorted(cu_seqlens, token, right=True)
        token_row = token + bounds_so_far * past

        lag = torch.arange(past, device=x.device)
        shift = past * torch.arange(num_sequences, device=x.device)
        first_row, end_row = (bound + shift for bound in (cu_seqlens[:-1], cu_seqlens[1:]))

        extended = x.new_zeros(num_sequences * past + T, self.channels)
        extended = extended.index_copy(0, token_row, x.squeeze(0))
        if state is not None:
            history_row = (first_row[:, None] + lag).flatten()
            extended = extended.index_copy(0, history_row, state.to(x.dtype).flatten(0, 1))
        if state is None:
            y = short_convolution(x, self.weight, cu_seqlens=cu_seqlens, silu=silu)
        else:
            y = short_convolution(extended[None], self.weight, silu=silu)[:, token_row]
        # The `past` rows before a sequence's end: its last tokens, and of its history what it left.
        return y, extended[end_row[:, None] + lag]
