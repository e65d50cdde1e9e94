"""The baseline everybody starts with: `transformers.generate`, KV cache on, one prompt after the other.

The only file of this room that imports torch and transformers, and only when the baseline runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.interfaces.clock import Clock


class NaiveBaseline:
    """Greedy decoding of exactly `max_tokens` tokens a prompt with a plain `transformers` causal LM."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self._model = model.eval()
        self._clock = clock

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[list[int]], list[float]]:
        """Output token ids of each prompt, and when each was done, seconds on the clock."""
        import torch
        import transformers

        configuration: Any = transformers.GenerationConfig
        # Fields left at None are filled from the model's own config, so it must not stop or sample by itself.
        self._model.generation_config = configuration(pad_token_id=0)
        config = configuration(max_new_tokens=max_tokens, do_sample=False, use_cache=True, pad_token_id=0)
        outputs: list[list[int]] = []
        finished_at: list[float] = []
        with torch.inference_mode():
            for prompt in prompts:
                token_ids = torch.tensor([list(prompt)], device=self._model.device)
                mask = torch.ones_like(token_ids)
                sequence = self._model.generate(token_ids, attention_mask=mask, generation_config=config)
                outputs.append(sequence[0, len(prompt) :].tolist())
                finished_at.append(self._clock.now())
        if any(len(output) != max_tokens for output in outputs):
            raise LlmkitError(f"the baseline stopped before {max_tokens} tokens: its throughput would be wrong")
        return outputs, finished_at

    def describe(self) -> dict[str, str]:
        """What it runs on, to be shown beside the numbers."""
        parameter = next(self._model.parameters())
        return {
            "naive_dtype": str(parameter.dtype).removeprefix("torch."),
            "naive_device": parameter.device.type,
            "naive_attention": str(self._model.config._attn_implementation),
        }
