"""`docs/models.md`: which architectures run, what is special about them, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.nightly.page import Circumstances

HEAD = ("model", "what is special", "layers", "arrangements", "largest difference")


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one architecture.

    `refusal` is llmkit's reason, if it had one; `untried` says why there was no tiny model to try. Otherwise: `special`
    phrases, `is_fused`, in how many arrangements it ran, the largest difference of any logit, and what went wrong.
    """

    name: str
    refusal: str = ""
    untried: str = ""
    special: tuple[str, ...] = ()
    is_fused: bool = False
    num_runs: int = 0
    error: float = 0.0
    failures: tuple[str, ...] = ()


def write_models_page(findings: Sequence[Finding], versions: str, where: Circumstances) -> str:
    """The whole page, Markdown."""
    ran = [finding for finding in findings if not finding.refusal and not finding.untried]
    untried = [finding for finding in findings if finding.untried]
    equal = [finding for finding in ran if finding.num_runs and not finding.failures]
    refused = [finding for finding in findings if finding.refusal]
    failures = [failure for finding in findings for failure in finding.failures]
    num_fused = sum(finding.is_fused for finding in equal)
    parts = [
        "# Models",
        f"`{where.command}` wrote this page, for commit {where.commit} on Python {where.python}, {versions}, in "
        f"{where.seconds / 60:.0f} minutes; `make nightly` writes it anew. It goes through every causal LM that "
        "transformers knows, each as a tiny model with seeded noisy weights, and some of them in several variants.",
        f"**{len(equal)} of {len(findings)} are equal to `transformers.generate`, {len(refused)} are refused by name, "
        f"{len(ran) - len(equal)} differ; {len(untried)} could not be tried.** {num_fused} of the equal ones "
        "have fused layers.",
        "Equal means: in float64, greedy tokens are the same and every logit is within 1e-9, for prompts on both sides "
        "of a window and of a block, several at once. The arrangements (scheduler, cache, chunk, budget, preemption, "
        "depth, fused or not) are a pairwise covering array over all architectures: every two choices meet in one, so "
        "every architecture meets every scheduler and every cache, and every scheduler every cache.",
        f"## Equal ({len(equal)})",
        _table(equal),
        f"## Refused ({len(refused)})",
        "Before their weights load, with this reason.",
        _reasons([(finding.name, finding.refusal) for finding in refused]),
        *_not_tried(untried),
        "## Failures",
        "\n".join(f"- {failure}" for failure in failures) or "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _not_tried(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    reasons = _reasons([(finding.name, finding.untried) for finding in findings])
    return [f"## Not tried ({len(findings)})", "No tiny model could be made.", reasons]


def _table(findings: Sequence[Finding]) -> str:
    rows = [HEAD, ("---", "---", "---", "---:", "---:")]
    for one in findings:
        layers = "fused" if one.is_fused else "transformers'"
        rows.append((one.name, ", ".join(one.special), layers, str(one.num_runs), f"{one.error:.0e}"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _reasons(pairs: Sequence[tuple[str, str]]) -> str:
    rows = [f"| {name} | {reason.replace('|', chr(92) + '|')} |" for name, reason in pairs]
    return "\n".join(["| model | reason |", "|---|---|", *rows])
