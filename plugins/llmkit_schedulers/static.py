"""Static batching: a batch is filled, then runs until its last request ends. What servers did before Orca (2022)."""

from llmkit import ContinuousBatching, RequestQueue, RequestView, SchedulingStep


class Static(ContinuousBatching):
    """Nobody joins once a member of the batch has produced a token."""

    _is_filling = True

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        self._is_filling = all(r.num_output_tokens == 0 and r.num_runnable_tokens > 1 for r in queue.running)
        super().schedule(queue, step)

    def admit(self, request: RequestView, step: SchedulingStep) -> bool:
        return self._is_filling

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        return self.came_first(started, waiting)

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        """Nobody joins those who decode."""
        return True
