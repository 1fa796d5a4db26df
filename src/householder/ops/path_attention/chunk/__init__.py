"""`path_attention` in blocks: matrix products along a binary tree, with its exact gradient.

Tokens are cut into chunks of C; reflectors of a chunk multiply through their compact WY form. From
then on blocks double: two neighbours of n tokens become one of 2n. Each block of tokens a … b keeps

    F = H_b … H_a        Q← : H_a … H_i q_i, queries brought to its start
                         K→ : H_b … H_{j+1} k_j, keys brought to its end

When a left and a right block join, the queries of the right meet the keys of the left in a plain
rectangle of softmax attention, with logits Q← K→ᵀ, since exactly the reflectors between are in
them. Then both move on to the joined block's bounds: Q← ← Q← F_left in the right half,
K→ ← K→ F_rightᵀ in the left half, F = F_right F_left. So a vector is multiplied log₂(T / C) times,
however long the sequence, no pair of tokens is computed twice, and outside the C × C triangles on
the diagonal none is masked away. The softmax is carried from rectangle to rectangle.

Gates enter as sums on either side of a rectangle's border: all terms have one sign, and nothing
cancels.

Heads are worked through a few at a time. What the gradient keeps of such a portion, some T · K ·
log₂(T / C) numbers, is all the memory that grows faster than T, and it does not grow with the heads
or the batch. `tree` has the blocks, `portions` brings tensors to them and back, `outputs` and
`gradients` go through.
"""

from householder.ops.path_attention.chunk.gradients import backward
from householder.ops.path_attention.chunk.outputs import forward

__all__ = ["backward", "forward"]
