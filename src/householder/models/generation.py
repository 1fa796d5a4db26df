"""Continue sequences token by token, on a GPU by replaying a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from householder.nn import PaTHState
from householder.nn._checks import check_positive_int

if TYPE_CHECKING:
    from householder.models.causal_lm import CausalLM

# Asking the device whether all sequences have ended waits for it: so many tokens are queued first.
_TOKENS_BETWEEN_CHECKS = 16


class Decoder:
    """Continue a batch of sequences, one token of each at a time, without gradients.

    The prompts are read at once. Each token then changes the layers' states in place. On a GPU the
    second token captures that step in a CUDA graph, and from then on a token costs the host one
    launch, where the layers' own launches would take longer than the device needs for them.

    Args:
        model: a `CausalLM`, in any mode.
        tokens: the prompts, int64 `[B, T]`, at least one token each.
        max_new_tokens: how many tokens there must be room for behind them.
        mask: bool `[B, T]`, False for what fills rows up in front; None where nothing does.
        graph: capture a CUDA graph. None does where that is possible: on a GPU, outside of
            autocast, with whole parameters, and with PaTH layers of a size that has kernels.

    Attributes:
        logits: `[B, vocab_size]` after the last token. The next step may overwrite them.

    Raises:
        ValueError: a shape does not fit, or `graph` is True where it is not possible.
        TypeError: `tokens` is not int64.

    Examples:
        >>> from householder.models import CausalLM, CausalLMConfig
        >>> model = CausalLM(CausalLMConfig(256, d_model=32, num_layers=2, head_dim=16))
        >>> prompt = torch.randint(256, (2, 5))
        >>> decoder = Decoder(model, prompt, max_new_tokens=3)
        >>> for _ in range(3):
        ...     token = decoder.logits.argmax(-1)
        ...     logits = decoder.step(token)
        >>> logits.shape
        torch.Size([2, 256])
    """

    @torch.no_grad()
    def __init__(
        self,
        model: CausalLM,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        mask: Tensor | None = None,
        graph: bool | None = None,
    ) -> None:
        check_positive_int("Decoder", "max_new_tokens", max_new_tokens)
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(
                f"Decoder: `tokens` must be [B, T] with a token at least, got shape "
                f"{list(tokens.shape)}; begin with one"
            )
        self._model = model
        hidden, states = model.hidden(tokens, mask=mask, return_states=True)
        self._states = model.reserve(states, tokens.shape[1] + max_new_tokens)
        self.logits: Tensor = model.logits(hidden[:, -1])
        self._room = max_new_tokens
        self._warm = False
        self._tokens = tokens[:, -1].clone()
        self._graph: torch.cuda.CUDAGraph | None = None
        reason = self._why_no_graph() if graph is None or graph else "it is not asked for"
        if graph and reason is not None:
            raise ValueError(
                f"Decoder: `graph` must be None or False here, got True: {reason}; "
                "with None a graph is captured where that is possible"
            )
        self._captures = reason is None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each sequence and return the logits of the next.

        Args:
            tokens: int64 `[B]`, on the model's device.

        Returns:
            `[B, vocab_size]`; the next step may overwrite them.

        Raises:
            ValueError: `tokens` has another shape, or there is no room left.
            TypeError: `tokens` is not int64.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(
                f"Decoder.step: `tokens` must be [B={len(self._tokens)}], got shape "
                f"{list(tokens.shape)}; give one token of each sequence"
            )
        if tokens.dtype != torch.int64:
            raise TypeError(
                f"Decoder.step: `tokens` must be int64, got {tokens.dtype}; convert with .long()"
            )
        if self._room == 0:
            raise ValueError(
                "Decoder.step: there must be room for another token, and all of `max_new_tokens` "
                "are used; make the decoder with more"
            )
        self._room -= 1
        if self._captures and self._warm and self._graph is None:
            self._capture()
        if self._graph is None:
            self._warm = True  # kernels are compiled and libraries loaded by now
            self.logits = self._model.step_(tokens, self._states)
            return self.logits
        self._tokens.copy_(tokens)
        self._graph.replay()
        for state in self._path_states():
            state.cache.replayed()
        return self.logits

    def _capture(self) -> None:
        """Record a step; it is not run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._model.step_(self._tokens, self._states)
        self._graph = graph

    def _why_no_graph(self) -> str | None:
        if not self._tokens.is_cuda:
            return f"it needs a CUDA device, and the model is on {self._tokens.device}"
        if any(hasattr(parameter, "device_mesh") for parameter in self._model.parameters()):
            return "the parameters are divided among processes, which exchange them at each step"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on, whose copies of weights do not outlive it"
        if not all(state.cache.has_kernels for state in self._path_states()):
            return "a PaTH layer's heads have a size that kernels do not take"
        return None

    def _path_states(self) -> list[Any]:
        return [state for state in self._states if isinstance(state, PaTHState)]


def generate(
    model: CausalLM,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_tokens: int | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    graph: bool | None = None,
) -> Tensor:
    """Do what `CausalLM.generate` says."""
    check_draw_options("CausalLM.generate", temperature, top_k, top_p)
    if num_tokens is not None:
        check_positive_int("CausalLM.generate", "num_tokens", num_tokens)
    decoder = Decoder(model, tokens, max_new_tokens=max_new_tokens, mask=mask, graph=graph)
    batch_size = tokens.shape[0]
    new = tokens.new_zeros(batch_size, max_new_tokens)
    running = tokens.new_ones(batch_size, dtype=torch.bool)
    count = 0
    while True:
        logits = decoder.logits[:, :num_tokens]
        token = draw(logits, temperature, top_k, top_p, generator)
        if stop is not None:
            token = torch.where(running, token, stop)
            running &= token != stop
        new[:, count] = token
        count += 1
        ended = stop is not None and count % _TOKENS_BETWEEN_CHECKS == 0 and not running.any()
        if ended or count == max_new_tokens:
            break
        decoder.step(token)
    if stop is not None:
        # What is behind every row's first stop is not wanted.
        before = (new[:, :count] != stop).sum(1)
        count = min(count, int(before.max()) + 1)
    return torch.cat([tokens, new[:, :count]], dim=1)


def draw(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw a token for each row of `logits [B, V]`, `[B]`; see `CausalLM.generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if those before it do not reach top_p; the first always does.
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(kept).scatter(-1, order, kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def check_draw_options(
    where: str, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise where an option of `draw` is out of range (ValueError) or no number (TypeError)."""
    for name, value in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{where}: `{name}` must be a number, got {value!r}; pass a float")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"{where}: `temperature` must be finite and at least 0, got {temperature}; "
            "0 takes the likeliest token, 1 draws as the model says"
        )
    if top_k is not None:
        check_positive_int(where, "top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"{where}: `top_p` must be above 0 and at most 1, got {top_p}; "
            "None draws among all tokens"
        )
