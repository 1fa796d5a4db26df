"""Train causal language models on text: tokens, batches, loop, evaluation, generation."""

from householder.train.text.config import TextConfig
from householder.train.text.folder import run_text
from householder.train.text.processes import Processes, join_processes
from householder.train.text.run import TextResult

__all__ = ["Processes", "TextConfig", "TextResult", "join_processes", "run_text"]
