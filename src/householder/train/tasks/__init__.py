"""Synthetic tasks with their published definitions, and the metrics they are reported in."""

from householder.train.tasks.base import IGNORE_INDEX, Batch, Metric, Task
from householder.train.tasks.chomsky import BracketedArithmetic, ModularArithmetic, Parity
from householder.train.tasks.flip_flop import FlipFlop
from householder.train.tasks.mqar import MultiQueryAssociativeRecall
from householder.train.tasks.registry import make_task, task_names
from householder.train.tasks.word_problems import WordProblem

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BracketedArithmetic",
    "FlipFlop",
    "Metric",
    "ModularArithmetic",
    "MultiQueryAssociativeRecall",
    "Parity",
    "Task",
    "WordProblem",
    "make_task",
    "task_names",
]
