"""One layer of a model: a token mixer and an MLP, each added to the residual stream."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from householder.models._recompute import keeping_the_dear
from householder.nn import DeltaProductMixer
from householder.nn._checks import check_positive_int
from householder.nn.initialization import init_residual_weight, init_weight
from householder.nn.softmax_attention import SoftmaxAttention
from householder.ops import swiglu, swiglu_linear

Mixer: TypeAlias = DeltaProductMixer | SoftmaxAttention
"""A layer in which tokens meet. The states of `DeltaProductMixer` are values, those of attention
are used up by the next call."""


def default_mlp_width(d_model: int) -> int:
    """Return the published width of a SwiGLU: 8/3 · d_model, rounded up to a multiple of 256.

    8/3 gives its three matrices as many parameters as the two of an MLP of width 4 · d_model.

    Args:
        d_model: size of the input and output vectors.

    Examples:
        >>> default_mlp_width(128), default_mlp_width(1024)
        (512, 2816)
    """
    return -(-int(8 / 3 * d_model) // 256) * 256


class SwiGLU(nn.Module):
    """Apply a gated MLP to each token: y = W_down (SiLU(W_gate x) ⊙ W_up x), without biases.

    Args:
        d_model: size of the input and output vectors.
        width: size of the hidden vector; `None` for `default_mlp_width(d_model)`.
        init_std: standard deviation of the initial weights; `None` for PyTorch's own rule.
        num_layers: blocks in the model, which scales the initial `down_proj` down; `None` for none.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> SwiGLU(16, width=32)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    References:
        GLU Variants Improve Transformer (Shazeer, 2020), https://arxiv.org/abs/2002.05202
    """

    def __init__(
        self,
        d_model: int,
        width: int | None = None,
        *,
        init_std: float | None = None,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("SwiGLU", "d_model", d_model)
        width = default_mlp_width(d_model) if width is None else width
        check_positive_int("SwiGLU", "width", width)
        self.init_std = init_std
        self.num_layers = num_layers
        self.gate_proj = nn.Linear(d_model, width, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(d_model, width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew from PyTorch's global generator."""
        init_weight(self.gate_proj.weight, self.init_std)
        init_weight(self.up_proj.weight, self.init_std)
        init_residual_weight(self.down_proj.weight, self.init_std, self.num_layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [..., d_model]` to `[..., d_model]`."""
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if type(down) is nn.Linear and down.bias is None and not _has_hooks(down):
            return swiglu_linear(gate, up, down.weight)
        # An adapter, a parametrization or somebody's hook is to see the hidden vector.
        return down(swiglu(gate, up))


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Block(nn.Module):
    """Mix tokens, then features: x <- x + mixer(norm x); x <- x + mlp(norm x).

    Both norms are RMSNorms.

    Args:
        mixer: the token mixer, any of `householder.nn`.
        mlp_width: hidden size of the SwiGLU; `None` for `default_mlp_width(d_model)`, 0 for a block
            of the mixer alone.
        norm_eps: added to the mean square in both norms.
        init_std: standard deviation of the MLP's initial weights; `None` for PyTorch's own rule.
        num_layers: blocks in the model, which scales the MLP's last weight down; `None` for none.
        device: of the norms and the MLP.
        dtype: of the norms and the MLP.

    Attributes:
        recompute: where the block is compiled for a GPU, keep for the backward pass the results of
            matrix products, convolutions and the mixer's recurrence or attention, and make the rest
            of what it needs anew. Off at first; `BlockStack` sets it.

    Examples:
        >>> from householder.nn import DeltaProduct
        >>> block = Block(DeltaProduct(32, num_householder=2))
        >>> block(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    mixer: Mixer

    def __init__(
        self,
        mixer: Mixer,
        *,
        mlp_width: int | None = None,
        norm_eps: float = 1e-5,
        init_std: float | None = None,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute = False
        d_model = mixer.d_model
        self.mixer_norm = nn.RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.mlp: SwiGLU | None = None
        if mlp_width == 0:
            return
        self.mlp_norm = nn.RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.mlp = SwiGLU(
            d_model,
            mlp_width,
            init_std=init_std,
            num_layers=num_layers,
            device=device,
            dtype=dtype,
        )

    def init_state(self, batch_size: int) -> Any:
        """Return the mixer's state before the first token."""
        return self.mixer.init_state(batch_size)

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Run the block on whole sequences; arguments and results as in the mixer's `forward`."""
        options = {"state": state, "cu_seqlens": cu_seqlens, "mask": mask}
        # Attention may have to read the bounds of packed sequences, where a compiler breaks off; a
        # checkpoint around that would go through all operations one by one, at every step.
        whole = cu_seqlens is None or isinstance(self.mixer, DeltaProductMixer)
        recompute = self.recompute and whole and x.is_cuda and torch.compiler.is_compiling()
        if recompute and state is None and not return_state:
            return keeping_the_dear(self._run, x, **options)
        return self._run(x, **options, return_state=return_state)

    def _run(
        self,
        x: Tensor,
        *,
        state: Any,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        return_state: bool = False,
    ) -> Any:
        mixed = self.mixer(
            self.mixer_norm(x),
            state=state,
            cu_seqlens=cu_seqlens,
            mask=mask,
            return_state=return_state,
        )
        if not return_state:
            return self._add_mlp(x + mixed)
        mixed, new_state = mixed
        return self._add_mlp(x + mixed), new_state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run the block on one token, `x [B, d_model]`; results as in the mixer's `step`."""
        mixed, new_state = self.mixer.step(self.mixer_norm(x), state)
        return self._add_mlp(x + mixed), new_state

    def step_(self, x: Tensor, state: Any) -> Tensor:
        """Run the block on one token, changing a state from the mixer's `reserve` in place."""
        return self._add_mlp(x + self.mixer.step_(self.mixer_norm(x), state))

    def _add_mlp(self, x: Tensor) -> Tensor:
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))
