"""Train causal language models on text: tokens, batches, loop, evaluation, generation."""
