"""Limits that nobody gave: they come from the device, and whoever schedules sees numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmkit import LLM, ContinuousBatching, Scheduler, SchedulerSettings
from llmkit.config import Choice
from llmkit.plugins import load_plugins

NAMES = load_plugins()[0].names("scheduler")


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_made_by_hand_has_limits(name: str) -> None:
    scheduler: type[Scheduler] = load_plugins()[0].get("scheduler", name).load()
    limits = scheduler(scheduler.Settings()).settings
    assert limits.max_num_batched_tokens == 2048
    assert limits.max_num_seqs == (1 if name == "sequential" else 64)


def test_what_is_given_or_a_scheduler_s_own_default_stays() -> None:
    class Pairs(SchedulerSettings):
        max_num_seqs: int = 2

    assert Pairs().on("cuda").model_dump() == {"max_num_seqs": 2, "max_num_batched_tokens": 16384}
    given = SchedulerSettings(max_num_seqs=7)
    assert given.on("cuda").max_num_seqs == 7 and given.on("cpu").max_num_batched_tokens == 2048
    assert SchedulerSettings().on("cuda").max_num_seqs == 256


def test_an_engine_takes_the_limits_of_its_model_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("embedded", max_model_len=64, num_blocks=8)
    chosen = Choice("continuous", ContinuousBatching.Settings())
    assert llm._scheduler(chosen).settings.max_num_seqs == 64
    monkeypatch.setattr(llm, "model", dataclasses.replace(llm.model, device=torch.device("cuda")))
    assert llm._scheduler(chosen).settings.max_num_seqs == 256
    assert chosen.settings.model_dump()["max_num_seqs"] is None, "the options were changed"
