"""`delta_product` in chunks: the recurrence blocked into matrix products, with its exact gradient.

A chunk is C tokens, that is R = C·N reflector rows r = (t, j), and C query rows: outputs exist
once per token, and so nothing here pays for N query rows a token. With the cumulative log gate
G_t inside the chunk, E = exp(G), Γ_rs = exp(G_t(r) − G_t(s)) and the state S at its start,

    M = strict_lower(diag(β) (Γ ⊙ K Kᵀ))        T = (I + M)⁻¹
    U = T diag(β) (V − diag(E) K S)               what each reflector really writes
    O = diag(E) Q S + (Γ ⊙ lower(Q Kᵀ)) U        Q already scaled; s ≤ t, its own token included
    S ← E_C S + (diag(E_C / E) K)ᵀ U

Only the last line and the product with S run chunk after chunk; the rest is batched over chunks.
The chunks of all sequences are worked through in *segments* small enough for the cache.

Gates enter as exponentials of differences, never as quotients: nothing overflows however strong
the decay, and `differences` are taken in float64 so that a weak gate after a strong one keeps its
precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.wy import compute_dtype, inverse_unit_lower

# The most and the fewest rows of one chunk. Between them a chunk has K rows: many more reflectors
# than dimensions make the triangle ill-conditioned (at K = 8, float32, β = 2, chunks of 64 rows had
# 4.6 times the error of the plain recurrence, chunks of 8 rows 1.7 times). At K = 64 and 128, 64
# rows took as long as 32 (two cores, AVX-512) and had a fifth more error.
MAX_CHUNK_ROWS = 32
MIN_CHUNK_ROWS = 8
# Elements of one [rows, K] tensor of a segment. On a CPU about ten such tensors share the caches;
# a GPU wants long batches.
SEGMENT_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Below exp(-745) a float64 is zero; the clamp makes a gate of -inf (a reset) an ordinary number.
MIN_LOG_GATE = -1.0e4


def chunk_tokens(N: int, K: int) -> int:
    """Return C, the tokens of a chunk, for N reflectors a token and key dimension K."""
    C = max(1, min(MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, K)) // N)
    # Multiples of 4 let the triangle be halved into equal blocks.
    return C - C % 4 if C > 4 else C


def max_chunks(B: int, T: int, N: int, K: int, num_sequences: int | None) -> int:
    """Return how many chunks the saved tensors have room for, from shapes alone."""
    C = chunk_tokens(N, K)
    # Every packed sequence may end in one chunk that is not full.
    return B * -(-T // C) if num_sequences is None else T // C + num_sequences


def saved_shapes(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, num_sequences: int | None
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Return shapes and dtypes of what `forward` saves: states, triangles and writes."""
    B, T, N, HV, V = v.shape
    K = k.shape[-1]
    room = HV * max_chunks(B, T, N, K, num_sequences)
    R = chunk_tokens(N, K) * N
    dtype = compute_dtype(q, k, v, beta)
    nothing = (0,), dtype  # what only the kernels keep
    return (
        ((room, K, V), dtype),
        ((room, R, R), dtype),
        ((room, R, V), dtype),
        nothing,
        nothing,
        nothing,
    )


class Segment(NamedTuple):
    """Chunks worked on together: those of a run of steps, step-major.

    Step c holds chunk c of every sequence that has one. Sequences are sorted by falling length,
    and so the ones a step advances are always the first ones.
    """

    first: int  # index of its first chunk among all chunks
    steps: list[tuple[int, int]]  # per step: its chunks, as a range inside the segment
    tokens: Tensor | slice  # packed: [chunks, C] token indices, T where padded; else a token range

    @property
    def num_chunks(self) -> int:
        return self.steps[-1][1]


class Layout:
    """Where the tokens of each chunk lie; moves tensors between `[B, T, …]` and chunk rows."""

    def __init__(
        self,
        B: int,
        T: int,
        N: int,
        heads: int,
        K: int,
        V: int,
        device: torch.device,
        cu: Tensor | None,
    ) -> None:
        self.B, self.T, self.N, self.C = B, T, N, chunk_tokens(N, K)
        elements = SEGMENT_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
        self.target_chunks = max(1, elements // (self.C * N * heads * max(K, V)))
        self.device = device
        self.order: Tensor | None = None
        self.num_sequences = B
        if cu is None:
            self.segments = list(self._dense())
        else:
            self.segments = list(self._packed(cu.tolist()))

    def _dense(self) -> Iterator[Segment]:
        # Of an empty batch there are no chunks, whatever T is.
        n = -(-self.T // self.C) if self.B else 0
        per_segment = max(1, self.target_chunks // max(1, self.B))
        for lo in range(0, n, per_segment):
            hi = min(n, lo + per_segment)
            steps = [(i * self.B, (i + 1) * self.B) for i in range(hi - lo)]
            yield Segment(lo * self.B, steps, slice(lo * self.C, min(hi * self.C, self.T)))

    def _packed(self, bounds: list[int]) -> Iterator[Segment]:
        lengths = [hi - lo for lo, hi in pairwise(bounds)]
        order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
        self.order = torch.tensor(order, device=self.device, dtype=torch.long)
        self.num_sequences = len(lengths)
        num_chunks = [-(-lengths[s] // self.C) for s in order]
        starts = torch.tensor([bounds[s] for s in order])
        ends = torch.tensor([bounds[s + 1] for s in order])
        within = torch.arange(self.C)

        first = 0
        steps: list[tuple[int, int]] = []
        tokens: list[Tensor] = []
        active = sum(n > 0 for n in num_chunks)
        for c in range(num_chunks[0] if num_chunks else 0):
            while num_chunks[active - 1] <= c:
                active -= 1
            index = starts[:active, None] + c * self.C + within
            index = torch.where(index < ends[:active, None], index, self.T)
            lo = steps[-1][1] if steps else 0
            steps.append((lo, lo + active))
            tokens.append(index)
            if steps[-1][1] >= self.target_chunks or c == num_chunks[0] - 1:
                yield Segment(first, steps, torch.cat(tokens).to(self.device))
                first, steps, tokens = first + steps[-1][1], [], []

    def gather(self, x: Tensor, segment: Segment, dtype: torch.dtype, group: int = 1) -> Tensor:
        """Bring `[B, T, n, H, D]` to `[chunks·H·group, C·n, D]`, padded with zeros.

        n is N, or 1 for what exists once per token; each head is repeated `group` times.
        """
        _, _, n, H, D = x.shape
        if isinstance(segment.tokens, slice):
            x = x[:, segment.tokens]
            steps = len(segment.steps)
            if (missing := steps * self.C - x.shape[1]) > 0:
                x = torch.cat([x, x.new_zeros(self.B, missing, n, H, D)], dim=1)
            x = x.unflatten(1, (steps, self.C)).transpose(0, 1)
        else:
            x = torch.cat([x[0], x.new_zeros(1, n, H, D)])[segment.tokens].unsqueeze(1)
        # Seen as [steps, B, C, n, H, D]: one copy casts it and moves the heads.
        rows = x.new_empty(*x.shape[:2], H, group, self.C, n, D, dtype=dtype)
        rows.copy_(x.permute(0, 1, 4, 2, 3, 5).unsqueeze(3))
        return rows.view(segment.num_chunks * H * group, self.C * n, D)

    def scatter(self, rows: Tensor, segment: Segment, out: Tensor, group: int = 1) -> None:
        """Undo `gather`: put rows back into `out [B, T, n, H, D]`, summed over `group`."""
        _, _, n, H, D = out.shape
        x = rows.view(segment.num_chunks, H, group, self.C, n, D)
        x = x.sum(2) if group > 1 else x.squeeze(2)
        x = x.permute(0, 2, 3, 1, 4)
        if isinstance(segment.tokens, slice):
            steps = len(segment.steps)
            x = x.unflatten(0, (steps, self.B)).transpose(0, 1)
            target = out[:, segment.tokens]
            full = target.shape[1] // self.C
            target[:, : full * self.C].unflatten(1, (full, self.C)).copy_(x[:, :full])
            if full < steps:
                rest = target[:, full * self.C :]
                rest.copy_(x[:, full, : rest.shape[1]])
        else:
            valid = segment.tokens < self.T
            out[0, segment.tokens[valid]] = x[valid].to(out.dtype)

    def sort_states(self, states: Tensor) -> Tensor:
        """Copy `[S, …]` with the sequences in the order the segments want."""
        return states.clone() if self.order is None else states[self.order]

    def unsort_states(self, states: Tensor) -> Tensor:
        """Undo `sort_states`."""
        if self.order is None:
            return states
        out = torch.empty_like(states)
        out[self.order] = states
        return out


class Gates(NamedTuple):
    """The decays of a segment's chunks; rows of a token's N reflectors share its gate."""

    pair: Tensor  # [b, C, C]: Γ, zero above the diagonal
    start: Tensor  # [b, C, 1]: E, from the chunk's start up to and including the token
    end: Tensor  # [b, C, 1]: E_C / E, from after the token to the chunk's end
    whole: Tensor  # [b, 1, 1]: E_C


def make_gates(g: Tensor, dtype: torch.dtype) -> Gates:
    """Turn log gates `[b, C, 1]` in float64 into the decays between tokens of the chunk."""
    G = g.clamp(min=MIN_LOG_GATE).cumsum(1)
    # Of the future the differences are positive and could overflow. (Filling them with -inf instead
    # is right too, but exp of -inf takes four times as long as of numbers: 400 against 100 µs for
    # 131,072 entries on two cores.)
    pair = (G - G.mT).to(dtype).clamp_(max=0).exp_().tril_()
    last = G[:, -1:]
    return Gates(pair, G.exp().to(dtype), (last - G).exp().to(dtype), last.exp().to(dtype))


class Problem(NamedTuple):
    """The op's inputs, with every per-token tensor brought to `[B, T, n, H, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float
    layout: Layout
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.v.shape[3] // self.k.shape[3]

    @property
    def shape_state(self) -> tuple[int, int, int]:
        """Heads, K and V of the state."""
        return self.v.shape[3], self.k.shape[-1], self.v.shape[-1]


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Problem:
    """Lay out the chunks and bring the inputs to one form."""
    B, T, N, HV, V = v.shape
    layout = Layout(B, T, N, HV, k.shape[-1], V, v.device, cu_seqlens)
    g = None if g is None else g[:, :, None, :, None]
    dtype = compute_dtype(q, k, v, beta)
    return Problem(q.unsqueeze(2), k, v, beta.unsqueeze(-1), g, scale, layout, dtype)


class Rows(NamedTuple):
    """A segment's inputs as batches of chunks, b = chunks · HV."""

    q: Tensor  # [b, C, K], scaled
    k: Tensor  # [b, R, K]
    v: Tensor  # [b, R, V]
    beta: Tensor  # [b, R, 1]
    gates: Gates | None

    def decay_rows(self, decay: Tensor) -> Tensor:
        """Repeat a per-token decay `[b, C, 1]` for the token's reflectors: `[b, R, 1]`."""
        N = self.k.shape[1] // decay.shape[1]
        return decay if N == 1 else decay.repeat_interleave(N, dim=1)

    def q_from_start(self) -> Tensor:
        """Return `diag(E) Q`: queries as they meet the state at the chunk's start."""
        return self.q if self.gates is None else self.q * self.gates.start

    def k_from_start(self) -> Tensor:
        """Return `diag(E) K`: keys as they read the state at the chunk's start."""
        return self.k if self.gates is None else self.k * self.decay_rows(self.gates.start)

    def k_to_end(self) -> Tensor:
        """Return `diag(E_C / E) K`: keys as they write the state at the chunk's end."""
        return self.k if self.gates is None else self.k * self.decay_rows(self.gates.end)

    def decay_pairs_(self, x: Tensor) -> Tensor:
        """Multiply `[b, R, R]` by Γ in place."""
        if self.gates is not None:
            b, C, _ = self.gates.pair.shape
            x.view(b, C, -1, C, x.shape[2] // C).mul_(self.gates.pair[:, :, None, :, None])
        return x

    def mask_attention_(self, x: Tensor) -> Tensor:
        """Multiply `[b, C, R]` by Γ, or without gates by the mask s ≤ t, in place."""
        b, C, R = x.shape
        if self.gates is not None:
            x.view(b, C, C, -1).mul_(self.gates.pair.unsqueeze(-1))
        elif R == C:
            x.tril_()
        else:
            x.view(b, C, C, -1).mul_(x.new_ones(C, C).tril_().unsqueeze(-1))
        return x

    def attention(self) -> Tensor:
        """Return `Γ ⊙ lower(Q Kᵀ)`, `[b, C, R]`."""
        return self.mask_attention_(self.q @ self.k.mT)


def load(p: Problem, segment: Segment) -> Rows:
    """Gather the segment's inputs."""
    gather, group = p.layout.gather, p.group
    gates = None
    if p.g is not None:
        gates = make_gates(gather(p.g, segment, torch.float64), p.dtype)
    return Rows(
        q=gather(p.q, segment, p.dtype, group).mul_(p.scale),
        k=gather(p.k, segment, p.dtype, group),
        v=gather(p.v, segment, p.dtype),
        beta=gather(p.beta, segment, p.dtype),
        gates=gates,
    )


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool = False,
) -> tuple[Tensor, ...]:
    """Run the recurrence; arguments as in the public `delta_product`.

    Returns:
        o, the final state, and what `backward` needs (empty unless `save`): the state at the start
        of every chunk `[chunks·HV, K, V]`, the triangles T `[chunks·HV, R, R]` and the writes
        U `[chunks·HV, R, V]`, chunks in the order of the segments.
    """
    p = make_problem(q, k, v, beta, g, scale, cu_seqlens)
    layout, dtype = p.layout, p.dtype
    HV, K, V = p.shape_state
    R = layout.C * layout.N

    o = v.new_empty(v.shape[0], v.shape[1], 1, HV, V)
    num_sequences = None if cu_seqlens is None else layout.num_sequences
    all_states, all_ut, all_u, *nothing = (
        v.new_empty(shape if save else (0, *shape[1:]), dtype=dtype)
        for shape, dtype in saved_shapes(q, k, v, beta, g, num_sequences)
    )

    if initial_state is None:
        state = v.new_zeros(layout.num_sequences, HV, K, V, dtype=dtype)
    else:
        state = layout.sort_states(initial_state.to(dtype))
    state = state.flatten(0, 1)

    for segment in layout.segments:
        rows = load(p, segment)
        b = segment.num_chunks * HV
        if save:
            span = slice(segment.first * HV, segment.first * HV + b)
            states, u, ut = all_states[span], all_u[span], all_ut[span]
        else:
            states, u, ut = state.new_empty(b, K, V), rows.v.new_empty(b, R, V), None

        m = rows.decay_pairs_(rows.k @ rows.k.mT).mul_(rows.beta)
        ut = inverse_unit_lower(m, out=ut)
        ut_beta = ut * rows.beta.mT
        ut_v = ut_beta @ rows.v
        ut_k = ut_beta @ rows.k_from_start()
        k_to_end = rows.k_to_end().mT
        for lo, hi in segment.steps:
            chunks = slice(lo * HV, hi * HV)
            active = state[: (hi - lo) * HV]
            states[chunks] = active
            torch.baddbmm(ut_v[chunks], ut_k[chunks], active, alpha=-1, out=u[chunks])
            if rows.gates is not None:
                active.mul_(rows.gates.whole[chunks])
            active.baddbmm_(k_to_end[chunks], u[chunks])
        o_rows = torch.bmm(rows.attention(), u).baddbmm_(rows.q_from_start(), states)
        layout.scatter(o_rows, segment, o)

    state = layout.unsort_states(state.unflatten(0, (layout.num_sequences, HV)))
    return o.squeeze(2), state, all_states, all_ut, all_u, *nothing


@without_autocast
def backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    all_states: Tensor,
    all_ut: Tensor,
    all_u: Tensor,
    *_: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, beta, g and initial_state, in closed form.

    One sweep over the chunks from the last to the first carries dS, the gradient of the state:

        dU = Aᵀ dO + diag-decayed K dS'      with A = Γ ⊙ lower(Q Kᵀ)
        dS = E_C dS' + (diag(E) Q)ᵀ dO − (T diag(β E) K)ᵀ dU

    All else is batched. With D = Tᵀ dU, the gradient of the residual V − diag(E) K S − …, and
    P = strict_lower(D Uᵀ) ⊙ Γ (no product T dT T appears):

        dV = diag(β) D        read = −diag(E) D Sᵀ − P K        dβ = rowsum(D ⊙ V + read ⊙ K)
        dQ = diag(E) dO Sᵀ + dA K              with dA = Γ ⊙ lower(dO Uᵀ)
        dK = diag(β) read + write,    write = diag(E_C / E) U dS'ᵀ − Pᵀ diag(β) K + dAᵀ Q

    Its own log gate scales all that crosses a token: what reads the chunk's first state at or after
    it, what an earlier write of the chunk gives to a read at or after it, what an earlier write and
    the first state give to the next chunk. dg is the sum of these parts of the loss. (The usual
    shorter way, a cumulative sum of Q ⊙ dQ − K ⊙ dK, subtracts parts that do not cross; under
    strong gates it keeps nothing of dg but their rounding.)
    """
    p = make_problem(q, k, v, beta, g, scale, cu_seqlens)
    layout, dtype, group = p.layout, p.dtype, p.group
    HV, K, V = p.shape_state
    C = layout.C

    dq, dk, dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in p[:4])
    dg = None if p.g is None else torch.empty_like(p.g, memory_format=torch.contiguous_format)
    if dfinal_state is None:
        dstate = v.new_zeros(layout.num_sequences, HV, K, V, dtype=dtype)
    else:
        dstate = layout.sort_states(dfinal_state.to(dtype))
    dstate = dstate.flatten(0, 1)
    do = do.unsqueeze(2)

    for segment in reversed(layout.segments):
        rows = load(p, segment)
        do_rows = layout.gather(do, segment, dtype)
        b = segment.num_chunks * HV
        span = slice(segment.first * HV, segment.first * HV + b)
        states, ut, u = all_states[span], all_ut[span], all_u[span]

        # The sweep: du becomes dU, dstates the gradient of the state after each chunk.
        k_to_end = rows.k_to_end()
        ut_k = ((ut * rows.beta.mT) @ rows.k_from_start()).mT
        attention = rows.attention()
        du = attention.mT @ do_rows
        from_q = rows.q_from_start().mT @ do_rows
        dstates = torch.empty_like(states)
        for lo, hi in reversed(segment.steps):
            chunks = slice(lo * HV, hi * HV)
            active = dstate[: (hi - lo) * HV]
            dstates[chunks] = active
            du[chunks].baddbmm_(k_to_end[chunks], active)
            if rows.gates is not None:
                active.mul_(rows.gates.whole[chunks])
            active.add_(from_q[chunks]).baddbmm_(ut_k[chunks], du[chunks], alpha=-1)

        d = ut.mT @ du
        pairs = rows.decay_pairs_((d @ u.mT).tril_(-1))
        dattention = do_rows @ u.mT
        read = d @ states.mT
        dq_rows = do_rows @ states.mT
        write = u @ dstates.mT
        if rows.gates is not None and dg is not None:
            read.mul_(rows.decay_rows(rows.gates.start))
            dq_rows.mul_(rows.gates.start)
            write.mul_(rows.decay_rows(rows.gates.end))
            passed_on = (states * dstates).sum((1, 2)).view(b, 1, 1) * rows.gates.whole
            dg_rows = passed_on + _crossing(
                reads=_dot(rows.q, dq_rows) - _per_token(_dot(rows.k, read).mul_(rows.beta), C),
                writes=_per_token(_dot(rows.k, write), C),
                pairs=_pair_losses(rows, attention.mul_(dattention), pairs),
            )
            layout.scatter(dg_rows, segment, dg)
        dattention = rows.mask_attention_(dattention)
        read.baddbmm_(pairs, rows.k).neg_()
        dq_rows.baddbmm_(dattention, rows.k)
        write.baddbmm_(pairs.mT, rows.beta * rows.k, alpha=-1).baddbmm_(dattention.mT, rows.q)

        layout.scatter(_dot(d, rows.v).add_(_dot(read, rows.k)), segment, dbeta)
        layout.scatter(dq_rows.mul_(p.scale), segment, dq, group)
        layout.scatter(write.addcmul_(read, rows.beta), segment, dk, group)
        layout.scatter(d.mul_(rows.beta), segment, dv)

    dinitial = None
    if initial_state is not None:
        dinitial = layout.unsort_states(dstate.unflatten(0, (layout.num_sequences, HV)))
        dinitial = dinitial.to(initial_state.dtype)
    return (
        dq.squeeze(2),
        dk,
        dv,
        dbeta.squeeze(-1),
        None if dg is None else dg[:, :, 0, :, 0],
        dinitial,
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of rows, `[b, rows, 1]`."""
    return (a * b).sum(-1, keepdim=True)


def _per_token(x: Tensor, C: int) -> Tensor:
    """Sum `[b, C·N, 1]` over the reflectors of each token, to `[b, C, 1]`."""
    return x.view(x.shape[0], C, -1).sum(-1, keepdim=True)


def _pair_losses(rows: Rows, losses: Tensor, pairs: Tensor) -> Tensor:
    """Return `[b, C, C]`: what the loss owes to writes of token s being read at token t.

    `losses [b, C, R]` holds the outputs' share; that of the corrections is subtracted here.
    """
    b, C, R = losses.shape
    corrections = (rows.k @ rows.k.mT).mul_(pairs).mul_(rows.beta)
    if R > C:
        losses = losses.view(b, C, C, R // C).sum(-1)
        corrections = corrections.view(b, C, R // C, C, R // C).sum((2, 4))
    return losses.sub_(corrections)


def _crossing(reads: Tensor, writes: Tensor, pairs: Tensor) -> Tensor:
    """Sum what crosses each token: reads from it on, writes before it, pairs on both sides of it.

    `reads` and `writes` are `[b, C, 1]`, `pairs` `[b, C, C]` (read at row, written at column).
    """
    b, C, _ = pairs.shape
    from_here_on = pairs.new_ones(C, C).triu_().expand(b, C, C)
    read = torch.bmm(from_here_on, torch.cat([pairs, reads], dim=2))
    # Shifted, not minus the token's own: the subtraction would round.
    before = torch.nn.functional.pad(writes.cumsum(1)[:, :-1], (0, 0, 1, 0))
    return read[:, :, :C].tril(-1).sum(-1, keepdim=True) + read[:, :, C:] + before
