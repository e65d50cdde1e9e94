"""Choosing tokens from logits, batched on the device. Knows nothing of requests, models or schedulers."""

from llmkit.model.sampling.sampled import Sampled
from llmkit.model.sampling.sampler import Sampler

__all__ = ["Sampled", "Sampler"]
