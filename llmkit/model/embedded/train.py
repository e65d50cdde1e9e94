"""Train the embedded model from nothing: corpus, tokenizer, weights, one folder that any Hugging Face loader takes.

    python -m llmkit.model.embedded.train --out DIR --minutes 6              # a GPU, the shipped model
    python -m llmkit.model.embedded.train --out DIR --steps 2 --batch 2 --length 128 --vocab 512   # a CPU, a smoke run

The schedule follows the larger of the two progresses (time, steps), so a run ends where its first limit does.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llmkit.model.embedded import corpus, tokenizer

__all__ = ["main"]

WARM_UP = 0.02
Loss = Callable[[Tensor], Tensor]


@dataclass
class Outcome:
    """What a run leaves behind: its best weights (lowest held-out loss) and the figures for the model card."""

    steps: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


def architecture(vocab_size: int, end: int) -> LlamaConfig:
    """The fixed shape: 5.6 million parameters at a vocabulary of 4096, so 11 MB in bf16."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=320,
        num_hidden_layers=4,
        intermediate_size=864,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )


def rate_at(progress: float, peak: float) -> float:
    """Learning rate at `progress` in [0, 1]: linear warm-up, then half a cosine down to nothing."""
    if progress < WARM_UP:
        return peak * (progress + 1e-3) / (WARM_UP + 1e-3)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def regularise(model: LlamaForCausalLM, dropout: float) -> None:
    """Drop a share of what each block adds to the residual stream, in training only; the saved model has none."""

    def drop(module: torch.nn.Module, _: Any, out: Tensor) -> Tensor:
        return functional.dropout(out, dropout, module.training)

    for layer in model.model.layers:
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.register_forward_hook(drop)


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are native, and so worth it."""
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


def loss_of(model: LlamaForCausalLM, device: torch.device) -> Loss:
    """Mean next-token loss, in nats, over windows `[batch, length + 1]` of token ids."""

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    return loss


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, loss: Loss, tokens: Tensor, length: int) -> float:
    """Mean loss over `tokens`, in consecutive windows (the last incomplete one is left out)."""
    model.train(False)
    windows = tokens.unfold(0, length + 1, length)
    parts = [windows[first : first + 8] for first in range(0, len(windows), 8)]
    total = sum(loss(part.long()).item() * len(part) for part in parts)
    model.train()
    return total / len(windows)


def optimise(
    model: LlamaForCausalLM, train: Tensor, held_out: Tensor, options: argparse.Namespace, device: torch.device
) -> Outcome:
    """Random windows of `train` until a limit is reached; measures and remembers the best on the way.

    One step in eight takes a quarter of the windows at four times the length, so that far positions are learnt too.
    """
    outcome, loss = Outcome(), loss_of(model, device)
    compiled: Loss = torch.compile(loss, dynamic=False) if device.type == "cuda" else loss
    optimizers = _optimizers(model, options, device)
    span = torch.arange(4 * options.length + 1, device=device)
    last, progress = len(train) - len(span), 0.0
    started = time.perf_counter()
    while progress < 1.0:
        is_long = outcome.steps % 8 == 7 and options.batch >= 4
        starts = torch.randint(last, (options.batch // 4 if is_long else options.batch, 1), device=device)
        value = compiled(train[starts + (span if is_long else span[: options.length + 1])].long())
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        outcome.steps += 1
        if outcome.steps == 1:
            value.item()
            started = time.perf_counter()  # the first step compiled the model: not counted in the time or the rate
        outcome.seconds = time.perf_counter() - started
        progress = max(outcome.seconds / (60 * options.minutes), outcome.steps / options.steps)
        if outcome.steps % options.every == 0 or progress >= 1.0:
            _measure(outcome, model, value.item(), held_out_loss(model, loss, held_out, options.length))
    return outcome


def _optimizers(
    model: LlamaForCausalLM, options: argparse.Namespace, device: torch.device
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings and gains; each with its peak rate."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    rest: list[dict[str, Any]] = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": options.decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, lr=options.muon_lr, momentum=0.95, weight_decay=options.decay)
    adamw = torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    return [(muon, options.muon_lr), (adamw, options.lr)]


def _measure(outcome: Outcome, model: LlamaForCausalLM, train_loss: float, held_out: float) -> None:
    when = f"step {outcome.steps:6d}  {outcome.seconds:6.1f} s"
    print(f"{when}  train {train_loss:.4f}  held out {held_out:.4f}", flush=True)
    outcome.curve.append({"step": outcome.steps, "train": round(train_loss, 4), "held_out": round(held_out, 4)})
    if held_out < outcome.best_loss:
        outcome.best_step, outcome.best_loss = outcome.steps, held_out
        outcome.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def main(arguments: list[str] | None = None) -> None:
    """Collect, tokenise, train, evaluate and save; every figure of the card ends up in `train_log.json`."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    text = corpus.collect(options.corpus)
    bpe = tokenizer.learn(text.train, options.vocab)
    model_config = architecture(options.vocab, tokenizer.END_ID)
    tokenizer.save(bpe, options.out, model_config.max_position_embeddings)
    # Each copy cuts the text elsewhere, so that an epoch is not a plain repetition of the one before.
    copies = [tokenizer.encode(bpe, text.train, options.piece, seed) for seed in range(options.copies)]
    train = torch.tensor([token for copy in copies for token in copy], dtype=torch.int16, device=device)
    held_out = torch.tensor(tokenizer.encode(bpe, text.held_out), dtype=torch.int16, device=device)
    print(f"{len(text.train)} files, {len(train):,} tokens in {options.copies} copies; {len(held_out):,} held out")

    model = _start(model_config, options.resume, device)
    regularise(model, options.dropout)
    outcome = optimise(model, train, held_out, options, device)
    model.load_state_dict(outcome.weights)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()  # what is shipped is what is measured; buffers stay in float32
    final = held_out_loss(model, loss_of(model, device), held_out, options.length)
    ends = {"bos_token_id": tokenizer.END_ID, "eos_token_id": tokenizer.END_ID}
    model.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call]
    model.save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)  # written for its owner alone; package data is for everybody
    log = _facts(options, outcome, device) | _figures(text, len(train) // options.copies, len(held_out), final)
    (options.out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"best step {outcome.best_step} of {outcome.steps}, {log['tokens_per_second']:,} tokens/s")
    print(f"held out, in bf16: {final:.4f} nats/token, {log['bits_per_byte']} bits/byte")


def _start(config: LlamaConfig, folder: Path | None, device: torch.device) -> LlamaForCausalLM:
    """Fresh weights, or those of a checkpoint of the same shape, in float32."""
    if folder is None:
        with device:
            return LlamaForCausalLM(config)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.hidden_size != config.hidden_size or model.config.vocab_size != config.vocab_size:
        raise SystemExit(f"{folder} holds a model of another shape")
    model.to(device)  # type: ignore[arg-type]
    return model


def _facts(options: argparse.Namespace, outcome: Outcome, device: torch.device) -> dict[str, Any]:
    seen = outcome.steps * options.batch * options.length
    shown = {name: value for name, value in vars(options).items() if isinstance(value, int | float)}
    return {
        "options": {name: value for name, value in shown.items() if math.isfinite(value)},
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "tokens_seen": seen,
        "seconds": round(outcome.seconds, 1),
        "tokens_per_second": round((seen - options.batch * options.length) / max(outcome.seconds, 1e-9)),
        "curve": outcome.curve,
    }


def _figures(text: corpus.Corpus, train_tokens: int, held_out_tokens: int, loss: float) -> dict[str, Any]:
    train_bytes, held_out_bytes = (sum(len(part.encode()) for part in side) for side in (text.train, text.held_out))
    return {
        "corpus_sha256": text.sha256,
        "train": {"files": len(text.train), "bytes": train_bytes, "tokens": train_tokens},
        "held_out": {"files": len(text.held_out), "bytes": held_out_bytes, "tokens": held_out_tokens},
        "nats_per_token": round(loss, 4),
        "bits_per_byte": round(loss * held_out_tokens / held_out_bytes / math.log(2), 4),
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llmkit.model.embedded.train", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write the checkpoint to")
    add("--corpus", type=Path, default=corpus.stdlib(), help="tree of .py files (this interpreter's standard library)")
    add("--resume", type=Path, help="checkpoint to go on from, with a fresh schedule")
    add("--minutes", type=float, default=math.inf, help="time limit, compilation not counted")
    add("--steps", type=float, default=math.inf, help="step limit")
    add("--batch", type=int, default=32, help="windows in a step")
    add("--length", type=int, default=512, help="tokens in a window; every eighth step has windows four times as long")
    add("--lr", type=float, default=3e-3, help="peak learning rate of AdamW (embeddings, gains)")
    add("--muon-lr", type=float, default=2e-2, help="peak learning rate of Muon (all other matrices)")
    add("--decay", type=float, default=0.1, help="weight decay of the matrices")
    add("--dropout", type=float, default=0.0, help="share of each block's output dropped in training")
    add("--copies", type=int, default=4, help="differently cut encodings of the corpus")
    add("--piece", type=int, default=400, help="mean distance in characters between two cuts")
    add("--vocab", type=int, default=4096, help="vocabulary size")
    add("--every", type=int, default=500, help="steps between two held-out measurements")
    add("--seed", type=int, default=0, help="of the initial weights and of the windows drawn")
    options = parser.parse_args(arguments)
    if math.isinf(options.minutes) and math.isinf(options.steps):
        parser.error("give a limit: --minutes, --steps or both")
    return options


if __name__ == "__main__":
    main()
