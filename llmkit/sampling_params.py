"""How tokens are chosen for one request: every field bounded and described. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import WithJsonSchema

from llmkit.errors import ConfigError, explain

MAX_LOGPROBS = 20
MAX_SAMPLES = 64
LogitsProcessor = Callable[[Any, Any], Any]
"""(tokens so far, int64 [n], logits [V]) -> logits [V]: tensors on the model's device."""


class SamplingParams(BaseModel):
    """How to choose tokens for one request. Every field is bounded; ConfigError, one line, names what is wrong.

    `temperature=0` is greedy. `top_k=0`, `top_p=1` and `min_p=0` switch the filters off. Penalties follow
    the usual definitions (repetition: Keskar et al. 2019; presence and frequency: OpenAI's API).
    `seed=None` derives a seed from the engine's seed and the request's number, so runs repeat.
    `logprobs=k` returns the sampled token and the k most likely ones; `prompt_logprobs=k` the same for the prompt.
    `logits_processors` are functions for what no other field says, a grammar for instance. They run in the engine's
    process for their own request's rows, in order, behind bias, masks and penalties. One must not write into its
    tokens; one that fails ends its request with the reason, and one that reads a tensor back waits for the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # keywords stay typed

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(explain(type(self), error)) from None

        __init__.__pydantic_base_init__ = True  # `model_validate` does without it and raises ValidationError

    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="samples of one prompt")
    max_tokens: int = Field(default=16, ge=1, le=1 << 20, description="most output tokens")
    min_tokens: int = Field(
        default=0, ge=0, le=1 << 20, description="no stop, no end of text before so many output tokens"
    )
    temperature: float = Field(
        default=1.0, ge=0.0, le=100.0, description="0 is greedy; above 1 flattens, below 1 sharpens"
    )
    top_k: int = Field(default=0, ge=0, description="only the so many likeliest tokens; 0: all")
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="only the likeliest tokens that make up this probability"
    )
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="only tokens at least this likely, relative to the likeliest"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, le=10.0, description="logits of tokens seen are divided (if negative, multiplied) by it"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="taken off the logit of every token in the output"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="taken off once for each time a token is in the output"
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict, max_length=1024, description="token id: what is added to its logit, -100 to 100"
    )
    allowed_token_ids: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="no other token may be chosen; null: any"
    )
    bad_token_ids: tuple[int, ...] = Field(default=(), description="tokens that may not be chosen")
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=1 << 63,
        description="seed of the noise; null: derived from engine.seed and the request's number",
    )
    stop: tuple[str, ...] = Field(
        default=(), max_length=16, description="texts that end the output and are not part of it"
    )
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=128, description="tokens that end the output")
    ignore_eos: bool = Field(default=False, description="go on after the end-of-text token")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="log-probabilities of the sampled and so many likeliest tokens; null: none",
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="the same for the prompt's tokens"
    )

    logits_processors: Annotated[
        tuple[LogitsProcessor, ...],
        Field(max_length=16),
        WithJsonSchema({"type": "array", "items": {"type": "functions, of Python only"}}),
    ] = Field(
        default=(), exclude=True, description="functions (tokens so far [n], logits [V]) -> logits [V]; Python only"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")
        if not all(abs(bias) <= 100 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias values must lie in [-100, 100]")
        return self
