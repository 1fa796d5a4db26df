"""Tasks by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from householder.train.tasks import groups
from householder.train.tasks.base import Task
from householder.train.tasks.chomsky import BracketedArithmetic, ModularArithmetic, Parity
from householder.train.tasks.flip_flop import FlipFlop
from householder.train.tasks.mqar import MultiQueryAssociativeRecall
from householder.train.tasks.word_problems import WordProblem, a5_cycles, s5_moves

_TASKS: dict[str, Callable[..., Task]] = {
    "s3": lambda: WordProblem(groups.symmetric_group(3)),
    "s4": lambda: WordProblem(groups.symmetric_group(4)),
    "a5": lambda: WordProblem(groups.alternating_group(5)),
    "s5": lambda: WordProblem(groups.symmetric_group(5)),
    "a5-cycles": a5_cycles,
    "s5-swaps": partial(s5_moves, 2, "s5-swaps"),
    "s5-3moves": partial(s5_moves, 3, "s5-3moves"),
    Parity.name: Parity,
    ModularArithmetic.name: ModularArithmetic,
    BracketedArithmetic.name: BracketedArithmetic,
    MultiQueryAssociativeRecall.name: MultiQueryAssociativeRecall,
    "flip-flop": FlipFlop,
    "flip-flop-sparse": lambda: FlipFlop(p_ignore=0.98, name="flip-flop-sparse"),
    "flip-flop-dense": lambda: FlipFlop(p_ignore=0.1, name="flip-flop-dense"),
}

# "mqar-64" has 64 pairs, "mqar-8-256" 8 pairs of a vocabulary of 256 tokens.
_MQAR = re.compile(r"mqar-(?P<num_pairs>\d+)(-(?P<vocab_size>\d+))?")

# Families with a number in their name: "z60" is Z_60.
_FAMILIES: dict[str, Callable[[int], groups.Group]] = {
    "z": groups.cyclic_group,
    "d": groups.dihedral_group,
}


def task_names() -> list[str]:
    """List the names that `make_task` takes; "z<m>" and "d<m>" stand for "z60", "d5" and so on.

    "mqar-<pairs>" and "mqar-<pairs>-<vocab>" are the task "mqar" with these options.

    Examples:
        >>> task_names()[:4]
        ['z<m>', 'd<m>', 's3', 's4']
    """
    mqar = ("mqar-<pairs>", "mqar-<pairs>-<vocab>")
    return [*(f"{letter}<m>" for letter in _FAMILIES), *_TASKS, *mqar]


def make_task(name: str, **options: Any) -> Task:
    """Make a task by name.

    Args:
        name: one of `task_names()`, with numbers in place of `<…>`: "z2", "d5", "mqar-64".
        options: keyword arguments of the task; a word problem has none.

    Raises:
        ValueError: there is no task of that name, or an option's value does not fit.
        TypeError: the task has no such option.

    Examples:
        >>> make_task("s3")
        WordProblem('s3', vocab_size=7, num_classes=6, metric='prefix')
        >>> make_task("z60").num_classes
        60
    """
    family = re.fullmatch(r"([a-z])(\d+)", name)
    if name in _TASKS:
        make = _TASKS[name]
    elif family and family[1] in _FAMILIES:
        make = partial(_word_problem, _FAMILIES[family[1]], int(family[2]))
    elif recall := _MQAR.fullmatch(name):
        numbers: dict[str, Any] = {k: int(v) for k, v in recall.groupdict().items() if v}
        make = partial(_recall, name, **numbers)
    else:
        raise ValueError(
            f"make_task: `name` must be one of {', '.join(task_names())}, got {name!r}; choose one "
            "of them, with numbers for <…> (z60, d5, mqar-64)"
        )
    accepted = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    unknown = sorted(options.keys() - set(accepted))
    if unknown:
        raise TypeError(
            f"make_task: the options of {name!r} are {', '.join(accepted) or 'none'}, got "
            f"{', '.join(unknown)}; drop or rename them"
        )
    return make(**options)


def _recall(
    name: str,
    *,
    num_pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_filler: bool = False,
) -> Task:
    task = MultiQueryAssociativeRecall(
        num_pairs=num_pairs, vocab_size=vocab_size, power=power, random_filler=random_filler
    )
    task.name = name
    return task


def _word_problem(make_group: Callable[[int], groups.Group], m: int) -> WordProblem:
    return WordProblem(make_group(m))
