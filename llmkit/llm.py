"""`LLM`: prompts in, completions out. The usual way to use llmkit from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llmkit.config import Choice, choose, validate
from llmkit.engine.detokenizer import StreamDetokenizer
from llmkit.engine.engine import Engine
from llmkit.engine.limits import check_request
from llmkit.engine.patience import PatientSteps
from llmkit.engine.progress import Progress
from llmkit.engine.quiet import quiet_collector
from llmkit.engine.settings import EngineSettings
from llmkit.errors import ConfigError, ModelError, RequestError, did_you_mean, first_line
from llmkit.interfaces.attention import AttentionBackend
from llmkit.interfaces.clock import Clock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.model.lean import lean_imports
from llmkit.model.spec import ModelSpec
from llmkit.outputs import Collector, StreamOutput
from llmkit.plugins import load_plugins
from llmkit.types import Request, RequestOutput, SamplingParams

with lean_imports():
    import torch

    from llmkit.engine.assembly import build_engine, check_settings
    from llmkit.engine.backends import build_backend, choose_backend
    from llmkit.model.loading import DescribedModel, LoadedModel, device_of, load_model

Prompt = str | Sequence[int]
"""Text, or token ids."""
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
"""One for all prompts, one for each, or the defaults."""
Encode = Callable[[Any], list[int]]
Named = str | Mapping[str, Any] | Choice
"""A component: its name, `{"name": ..., option: ...}`, or a validated `Choice`."""
KEYWORDS = ("model", "scheduler", "cache", "attention", "plugins")
"""Keywords of `LLM` that are no options of the engine."""


class LLM:
    """A model with a scheduler, a cache and an attention backend.

    `model` may also be a `ModelSpec` or a `LoadedModel`, whose weights are then shared. `plugins` are extra plugin
    objects, such as observers or components of your own. `check` is called before weights load and raises what speaks
    against the model. Further keywords are fields of `EngineSettings`.
    Raises ConfigError, ModelError or CapacityError, each in one line, before anything heavy happens where it can.
    """

    def __init__(
        self,
        model: Named | ModelSpec | LoadedModel = "embedded",
        scheduler: Named = "continuous",
        cache: Named = "paged",
        attention: Named = "auto",
        *,
        engine: EngineSettings | Mapping[str, Any] | None = None,
        plugins: Sequence[object] = (),
        clock: Clock | None = None,
        check: Callable[[DescribedModel], object] = lambda _: None,
        **engine_options: Any,
    ) -> None:
        self.settings = _engine_settings(engine, engine_options)
        self.registry, self.plugin_manager = load_plugins(plugins)
        chosen_scheduler = choose(self.registry, "scheduler", scheduler)
        chosen_cache = choose(self.registry, "cache", cache)
        chosen_attention = choose(self.registry, "attention", attention)
        if isinstance(model, LoadedModel):
            self.model = self._given(model)
        else:
            self.model = self._load(model, chosen_attention, check)
        backend, backend_settings = self._backend(chosen_attention, self.model)
        self.attention = build_backend(backend, backend_settings, self.model, self.settings.block_size)
        self.engine: Engine = build_engine(
            self.model,
            self._scheduler(chosen_scheduler),
            (self.registry.get("cache", chosen_cache.name).load(), chosen_cache.settings),
            self.attention,
            self.settings,
            self.plugin_manager.hook,
            clock,
        )
        self._steps = PatientSteps(self.engine)
        self._num_requests = 0
        self._collectors: list[Collector] = []

    def _scheduler(self, chosen: Choice) -> Scheduler:
        """The chosen scheduler, with limits for the model's device where none are given."""
        settings: Any = chosen.settings
        scheduler: Scheduler = self.registry.get("scheduler", chosen.name).load()(settings.on(self.model.device.type))
        return scheduler

    def _given(self, model: LoadedModel) -> LoadedModel:
        """Refuse settings that would have loaded it differently."""
        dtype, device = self.settings.dtype, self.settings.device
        if dtype != "auto" and getattr(torch, dtype) != model.dtype:
            loaded = str(model.dtype).removeprefix("torch.")
            raise ConfigError(f"engine.dtype={dtype}: the given model {model.name!r} is loaded in {loaded}")
        if device not in ("auto", model.device.type):
            raise ConfigError(
                f"engine.device={device}: the given model {model.name!r} is loaded on {model.device.type}"
            )
        return model

    def _load(
        self, model: Named | ModelSpec, attention: Choice, check: Callable[[DescribedModel], object]
    ) -> LoadedModel:
        spec = model
        if not isinstance(spec, ModelSpec):
            choice = choose(self.registry, "model", spec)
            spec = self.registry.get("model", choice.name).load()(choice.settings)
        assert isinstance(spec, ModelSpec)
        dtype = None if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)
        checks = (lambda model: self._backend(attention, model), check)
        return load_model(spec, dtype, device_of(self.settings.device), checks)

    def _backend(self, chosen: Choice, model: DescribedModel) -> tuple[type[AttentionBackend], Any]:
        """The attention backend of `model` and its settings; ConfigError if these or the engine's do not fit it."""
        check_settings(model, self.settings)
        hooks, block_size = self.plugin_manager.hook, self.settings.block_size
        component = choose_backend(chosen.name, self.registry, hooks, model, block_size)
        return component.load(), chosen.settings if chosen.name != "auto" else component.settings()

    def generate(self, prompts: Prompts, sampling_params: Params = None) -> list[RequestOutput]:
        """Complete every prompt; outputs come in input order.

        A prompt that cannot run comes back with `finish_reason` "error" and the reason; its neighbours are unaffected.
        RequestError, and nothing runs, if the arguments are no prompts or parameters at all.
        """
        return self._complete(as_batch(prompts), sampling_params, self.encode)

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[StreamOutput]:
        """Like `generate`, but yields every increment as soon as it is known; the last of each has a finish_reason.

        Several streams and `generate` calls may take turns. Closing the iterator aborts what is left.
        """
        with self._collecting(as_batch(prompts), sampling_params, self.encode, streams=True) as collector:
            yield from collector.increments()
            while collector.is_open:
                self._step()
                yield from collector.increments()

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: Params = None,
    ) -> list[RequestOutput]:
        """`generate` for one conversation, or a list of them, through the model's chat template."""
        if not getattr(self._tokenizer(), "chat_template", None):
            raise ModelError(f"model {self.model.name!r} has no chat template; use generate")
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        return self._complete([messages] if is_one else list(messages), sampling_params, self._encode_chat)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; RequestError if it is neither text nor integers."""
        if isinstance(prompt, str):
            try:
                # too long a prompt is refused by the engine, which needs no warning beside it
                return list(self._tokenizer().encode(prompt, verbose=False))
            except ModelError:
                raise
            except Exception as error:
                is_broken = any("\ud800" <= character <= "\udfff" for character in prompt)
                why = "it is not valid Unicode" if is_broken else first_line(error)
                raise RequestError(f"the prompt cannot be encoded: {why}") from error
        # prompts are long, so their types are looked at, not the tokens one by one
        kinds = set(map(type, prompt)) if isinstance(prompt, Sequence) else {object}
        if isinstance(prompt, bytes) or not all(issubclass(kind, int) and kind is not bool for kind in kinds):
            of = f" of {', '.join(sorted(kind.__name__ for kind in kinds))}" if isinstance(prompt, list) else ""
            raise RequestError(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}{of}")
        return list(prompt) if kinds <= {int} else [*map(int, prompt)]

    def _encode_chat(self, conversation: Any) -> list[int]:
        tokenizer = self._tokenizer()
        try:
            messages = [dict(message) for message in conversation]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            return list(tokenizer.apply_chat_template(messages, **options))
        except Exception as error:
            raise RequestError(f"the chat template refuses this conversation: {first_line(error)}") from error

    def naive_model(self) -> Any:
        """A plain transformers model over the same weights, for comparisons."""
        return self.model.as_transformers()

    def _tokenizer(self) -> Any:
        if self.model.tokenizer is None:
            raise ModelError(f"model {self.model.name!r} has no tokenizer; give prompts as token ids")
        return self.model.tokenizer

    def _complete(self, batch: Sequence[Any], params: Params, encode: Encode) -> list[RequestOutput]:
        with quiet_collector(), self._collecting(batch, params, encode) as collector:
            while collector.is_open:
                self._step()
            return collector.outputs()

    def _step(self) -> None:
        """One step of the engine; what came of it goes to whoever asked, also to streams that pause just now."""
        for output in self._steps.step():
            for collector in self._collectors:
                collector.take(output)

    @contextmanager
    def _collecting(
        self, batch: Sequence[Any], params: Params, encode: Encode, streams: bool = False
    ) -> Iterator[Collector]:
        """Queue a batch; whatever has not ended when the block is left is aborted, and its blocks come back."""
        each = as_params(params, len(batch))
        collector = Collector(streams)
        self._collectors.append(collector)
        try:
            for prompt, param in zip(batch, each, strict=True):
                self._add(collector, prompt, param, encode)
            yield collector
        finally:
            self._collectors.remove(collector)
            self.engine.abort(collector.open_ids)
            while not self.engine.planner.requests and self.engine.has_unfinished:
                self.engine.step()

    def _add(self, collector: Collector, prompt: Any, params: SamplingParams, encode: Encode) -> None:
        """Queue the `n` samples of one prompt, all or none; the first computes it and the others reuse it."""
        now = self.engine.clock.now()
        text, token_ids = prompt if isinstance(prompt, str) else None, []
        number = self._num_requests
        self._num_requests += 1
        progresses = []
        try:
            token_ids = encode(prompt)
            for index in range(params.n):
                seed = sample_seed(self.settings.seed, number, params.seed, index)
                request = Request(f"{number}-{index}", list(token_ids), params, arrival_time=now, seed=seed)
                check_request(request, self.engine.limits)  # a tokenizer does not survive ids out of its range
                detokenizer = self._detokenizer(token_ids, params)
                progress = Progress(request, self.engine.limits.eos_token_ids, detokenizer, index, collector.streams)
                self.engine.add(request, progress, after=f"{number}-0" if index else None)
                progresses.append(progress)
        except (RequestError, ModelError) as error:
            collector.reject(text, tuple(token_ids), params.n, str(error), now)
        else:
            collector.expect(text, tuple(token_ids), progresses)

    def _detokenizer(self, prompt_token_ids: list[int], params: SamplingParams) -> StreamDetokenizer | None:
        backend = getattr(self.model.tokenizer, "backend_tokenizer", None)
        if backend is None and params.stop:
            raise RequestError(f"model {self.model.name!r} has no tokenizer; stop strings need one")
        return None if backend is None else StreamDetokenizer(backend, prompt_token_ids)


def as_batch(prompts: Prompts) -> list[Any]:
    """One prompt or many -> a list of prompts, not checked one by one. RequestError if it is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        kind = type(prompts).__name__
        raise RequestError(f"prompts are a string, a list of token ids or a list of those, not {kind}")
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)


def as_params(params: Params, num_prompts: int) -> list[SamplingParams]:
    """One set of parameters per prompt. RequestError if there is another number of them, or something else."""
    each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * num_prompts
    for param in each:
        if not isinstance(param, SamplingParams):
            kind = type(param).__name__
            raise RequestError(f"sampling parameters are a SamplingParams or a list of them, not {kind}")
    if len(each) != num_prompts:
        raise RequestError(f"{num_prompts} prompts but {len(each)} sampling parameters")
    return each


def sample_seed(engine_seed: int, number: int, seed: int | None, index: int) -> int:
    """Seed of sample `index`: the request's own for its first sample, else mixed (splitmix64), below 2**63."""
    if seed is not None and index == 0:
        return seed
    mixed = (seed if seed is not None else engine_seed * 0x9E3779B97F4A7C15 + number + 1) + index * 0xD1B54A32D192ED03
    mixed &= (1 << 64) - 1
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (mixed ^ (mixed >> 31)) >> 1


def _engine_settings(engine: EngineSettings | Mapping[str, Any] | None, options: Mapping[str, Any]) -> EngineSettings:
    """Settings from one or the other; a misspelt part among the keywords is told from a misspelt option."""
    if engine is not None and options:
        raise ConfigError(f"give engine settings or keywords, not both: {', '.join(options)}")
    for word in options:
        hint = did_you_mean(word, [*EngineSettings.model_fields, *KEYWORDS])
        if any(hint.endswith(f"{part!r}?") for part in KEYWORDS):
            raise ConfigError(f"{word}: no such keyword{hint}")
    return validate(EngineSettings, options if engine is None else engine, "engine")
