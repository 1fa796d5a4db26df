"""The Hugging Face ecosystem: what other people's models and tools need of this library."""

from householder.hf.gated_delta import TransformersPatch, use_in_transformers

__all__ = ["TransformersPatch", "use_in_transformers"]
