"""Beam search on `LLM.generate`: every round asks for one token of each beam, and beams share what they have in common.

    python beam_search.py "def main(" --beams 4 --max-tokens 24

Beams are ordinary prompts. The prefix cache finds the blocks of the prompt, and of all that beams have in common, so a
round computes only what lies behind the last full block of each beam. Candidates, scores and the end of the search are
those of `transformers.generate(num_beams=..., length_penalty=..., early_stopping=False)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from llmkit import LLM, RequestError, SamplingParams

MAX_LOGPROBS = 20
"""The most that `SamplingParams.logprobs` allows."""


@dataclass(frozen=True)
class Beam:
    """New tokens behind the prompt, and the sum of their log-probabilities (nats)."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0

    def score(self, length_penalty: float) -> float:
        """What finished beams are ranked by."""
        return self.logprob / len(self.token_ids) ** length_penalty


def beam_search(
    llm: LLM, prompt: Sequence[int], num_beams: int = 4, max_tokens: int = 16, length_penalty: float = 1.0
) -> list[Beam]:
    """The `num_beams` best continuations found, best first, each up to an end-of-text token or `max_tokens` long.

    Raises RequestError if `num_beams` is more than half the log-probabilities a request may ask for, or if the prompt
    cannot run.
    """
    if not 1 <= num_beams <= MAX_LOGPROBS // 2:
        raise RequestError(f"num_beams={num_beams} is not between 1 and {MAX_LOGPROBS // 2}")
    running, finished = [Beam()], list[Beam]()
    while True:
        candidates = grow(llm, prompt, running, 2 * num_beams)
        is_last = len(candidates[0].token_ids) == max_tokens
        ended = [beam for beam in candidates if is_last or beam.token_ids[-1] in llm.model.eos_token_ids]
        finished += [beam for beam in candidates[:num_beams] if beam in ended]
        finished = sorted(finished, key=lambda beam: -beam.score(length_penalty))[:num_beams]
        running = [beam for beam in candidates if beam not in ended][:num_beams]
        if not running or (len(finished) == num_beams and not improves(running[0], finished[-1], length_penalty)):
            return finished


def improves(running: Beam, finished: Beam, length_penalty: float) -> bool:
    """Whether the best running beam, taken as it is, would be better than the worst finished one."""
    return running.score(length_penalty) > finished.score(length_penalty)


def grow(llm: LLM, prompt: Sequence[int], beams: Sequence[Beam], number: int) -> list[Beam]:
    """The `number` likeliest ways to go on with any of `beams` by one token, likeliest first."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=number)
    outputs = llm.generate([[*prompt, *beam.token_ids] for beam in beams], params)
    candidates = []
    for beam, output in zip(beams, outputs, strict=True):
        if output.error is not None or output.logprobs is None:
            raise RequestError(output.error or "no log-probabilities came back")
        for token_id, logprob in output.logprobs[0].top:
            candidates.append(Beam((*beam.token_ids, token_id), beam.logprob + logprob))
    return sorted(candidates, key=lambda beam: -beam.logprob)[:number]


def main() -> None:
    """Print the beams of a prompt with their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()
    llm = LLM(options.model)
    for beam in beam_search(llm, llm.encode(options.prompt), options.beams, options.max_tokens):
        print(f"{beam.score(1.0):8.3f}  {llm.model.tokenizer.decode(beam.token_ids)!r}")


if __name__ == "__main__":
    main()
