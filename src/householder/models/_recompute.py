"""What a compiled block keeps for its backward pass: only what took long to make.

A compiler keeps the input of every matrix product that its backward pass would have to write to
memory again. Normalised vectors and gated ones cost no more than that to make anew, and are as
large as what they are made of.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Names of operations that are not to run twice: products, convolutions, attention, what processes
# send one another, and our own but those that are of one number each.
_DEAR = re.compile(
    r"aten::\w*mm(\.|$)|convolution|attention|attn|c10d"
    r"|householder::(?!swiglu|gated_rms_norm)"
)


def _policy(ctx: object, op: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    dear = _DEAR.search(op.name()) is not None
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS = functools.partial(create_selective_checkpoint_contexts, _policy)


def keeping_the_dear(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` in what is being compiled, and have the rest made anew for its gradient."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=_CONTEXTS, **kwargs)


def silence_advice() -> None:
    """Keep PyTorch from advising, at every first step, to look for operations in place here."""
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    if _is_no_advice not in logger.filters:
        logger.addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()
