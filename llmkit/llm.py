"""`LLM`: prompts in, completions out. The usual way to use llmkit from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from llmkit.config import Choice, choose, validate
from llmkit.engine.assembly import build_backend, build_engine, requirements_of
from llmkit.engine.detokenizer import StreamDetokenizer
from llmkit.engine.engine import Engine
from llmkit.engine.progress import Progress
from llmkit.engine.settings import EngineSettings
from llmkit.errors import ConfigError, ModelError, RequestError
from llmkit.interfaces.clock import Clock
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from llmkit.outputs import Collector, StreamOutput
from llmkit.plugins import load_plugins
from llmkit.types import Request, RequestOutput, SamplingParams

Prompt = str | Sequence[int]
"""Text, or token ids."""
Prompts = Prompt | Sequence[Prompt]
Named = str | Mapping[str, Any] | Choice
"""A component: its name, `{"name": ..., option: ...}`, or a validated `Choice`."""


class LLM:
    """A model with a scheduler, a cache and an attention backend.

    `model` may also be a `ModelSpec` or a `LoadedModel`, whose weights are then shared. `plugins` are extra plugin
    objects, such as observers or components of your own. Further keywords are fields of `EngineSettings`.
    Raises ConfigError, ModelError or CapacityError, each in one line, before anything heavy happens where it can.
    """

    def __init__(
        self,
        model: Named | ModelSpec | LoadedModel = "embedded",
        scheduler: Named = "continuous",
        cache: Named = "paged",
        attention: Named = "auto",
        *,
        engine: EngineSettings | None = None,
        plugins: Sequence[object] = (),
        clock: Clock | None = None,
        **engine_options: Any,
    ) -> None:
        if engine is not None and engine_options:
            raise ConfigError(f"give engine settings or keywords, not both: {', '.join(engine_options)}")
        self.settings = engine or validate(EngineSettings, engine_options, "engine")
        self.registry, self.plugin_manager = load_plugins(plugins)
        chosen_scheduler = choose(self.registry, "scheduler", scheduler)
        chosen_cache = choose(self.registry, "cache", cache)
        chosen_attention = choose(self.registry, "attention", attention)
        self.model = model if isinstance(model, LoadedModel) else self._load(model)
        backend_name = self._attention_name(chosen_attention.name)
        backend = self.registry.get("attention", backend_name)
        backend_settings = chosen_attention.settings if chosen_attention.name != "auto" else backend.settings()
        self.attention = build_backend(
            backend_name, backend.load(), backend_settings, self.model, self.settings.block_size
        )
        self.engine: Engine = build_engine(
            self.model,
            self.registry.get("scheduler", chosen_scheduler.name).load()(chosen_scheduler.settings),
            (self.registry.get("cache", chosen_cache.name).load(), chosen_cache.settings),
            self.attention,
            self.settings,
            self.plugin_manager.hook,
            clock,
        )
        self._num_requests = 0

    def _load(self, model: Named | ModelSpec) -> LoadedModel:
        spec = model
        if not isinstance(spec, ModelSpec):
            choice = choose(self.registry, "model", spec)
            spec = self.registry.get("model", choice.name).load()(choice.settings)
        assert isinstance(spec, ModelSpec)
        device = self.settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("engine.device=cuda: torch finds no CUDA device; use engine.device=cpu")
        dtype = None if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)
        return load_model(spec, dtype, torch.device(device))

    def _attention_name(self, name: str) -> str:
        if name != "auto":
            return name
        requirements = requirements_of(self.model, self.settings.block_size)
        bid = self.plugin_manager.hook.llmkit_select_attention(requirements=requirements)
        if bid is None:
            raise ConfigError(f"attention=auto: no installed backend bids for {requirements.device}")
        return str(bid)

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs come in input order.

        A prompt that cannot run comes back with `finish_reason` "error" and the reason; its neighbours are unaffected.
        """
        collector = self._submit(prompts, sampling_params)
        self._run(collector)
        return collector.outputs()

    def stream(
        self, prompts: Prompts, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[StreamOutput]:
        """Like `generate`, but yields every increment as soon as it is known; the last of each has a finish_reason."""
        collector = self._submit(prompts, sampling_params)
        yield from collector.rejected()
        try:
            while collector.is_open:
                for output in self.engine.step():
                    yield from collector.take(output)
        finally:
            self.engine.abort(collector.open_ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """`generate` for one conversation, or a list of them, through the model's chat template."""
        tokenizer = self._tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"model {self.model.name!r} has no chat template; use generate")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            tokenizer.apply_chat_template(list(c), add_generation_prompt=True, tokenize=True, return_dict=False)
            for c in conversations
        ]
        return self.generate(prompts, sampling_params)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; RequestError if it is neither text nor integers."""
        if isinstance(prompt, str):
            return list(self._tokenizer().encode(prompt))
        token_ids = list(prompt)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in token_ids):
            raise RequestError("a prompt is a string or a list of token ids")
        return token_ids

    def naive_model(self) -> Any:
        """A plain transformers model over the same weights, for comparisons."""
        return self.model.as_transformers()

    def _tokenizer(self) -> Any:
        if self.model.tokenizer is None:
            raise ModelError(f"model {self.model.name!r} has no tokenizer; give prompts as token ids")
        return self.model.tokenizer

    def _submit(self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None) -> Collector:
        batch = as_batch(prompts)
        each = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(batch):
            raise RequestError(f"{len(batch)} prompts but {len(each)} sampling parameters")
        collector = Collector()
        for prompt, param in zip(batch, each, strict=True):
            self._add(collector, prompt, param)
        return collector

    def _add(self, collector: Collector, prompt: Prompt, params: SamplingParams) -> None:
        """Queue the `n` samples of one prompt, all or none."""
        now = self.engine.clock.now()
        text = prompt if isinstance(prompt, str) else None
        try:
            token_ids = self.encode(prompt)
        except (RequestError, ModelError) as error:
            collector.reject(text, (), params.n, str(error), now)
            return
        number = self._num_requests
        self._num_requests += 1
        progresses = []
        for index in range(params.n):
            seed = sample_seed(self.settings.seed, number, params.seed, index)
            request = Request(f"{number}-{index}", list(token_ids), params, arrival_time=now, seed=seed)
            progress = Progress(request, self.engine.limits.eos_token_ids, self._detokenizer(token_ids), index)
            try:
                self.engine.add(request, progress)
            except RequestError as error:
                collector.reject(text, tuple(token_ids), params.n, str(error), now)
                return
            progresses.append(progress)
        collector.expect(text, tuple(token_ids), progresses)

    def _detokenizer(self, prompt_token_ids: list[int]) -> StreamDetokenizer | None:
        backend = getattr(self.model.tokenizer, "backend_tokenizer", None)
        return None if backend is None else StreamDetokenizer(backend, prompt_token_ids)

    def _run(self, collector: Collector) -> None:
        try:
            while collector.is_open:
                for output in self.engine.step():
                    for _ in collector.take(output):
                        pass
        finally:
            self.engine.abort(collector.open_ids)


def as_batch(prompts: Prompts) -> list[Prompt]:
    """One prompt or many -> a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def sample_seed(engine_seed: int, number: int, seed: int | None, index: int) -> int:
    """Seed of sample `index`: the request's own for its first sample, else mixed (splitmix64), below 2**63."""
    if seed is not None and index == 0:
        return seed
    mixed = (seed if seed is not None else engine_seed * 0x9E3779B97F4A7C15 + number + 1) + index * 0xD1B54A32D192ED03
    mixed &= (1 << 64) - 1
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (mixed ^ (mixed >> 31)) >> 1
