"""Built-in attention backends; registered by an entry point like anyone else's. Torch-free: backends load lazily."""

from llmkit import AttentionRequirements, Registry, hookimpl
from llmkit_attention.flash.limits import reasons_against
from llmkit_attention.flash.settings import FlashSettings


@hookimpl
def llmkit_register(registry: Registry) -> None:
    registry.add_attention(
        "sdpa", "llmkit_attention.sdpa:SdpaAttention", doc="PyTorch's scaled dot product attention, on any device."
    )
    registry.add_attention(
        "flash",
        "llmkit_attention.flash.backend:FlashAttention",
        FlashSettings,
        doc="Paged attention in Triton kernels, for CUDA.",
    )
    registry.add_attention(
        "flash_attn", "llmkit_attention.flash_attn:FlashAttnAttention", doc="The flash-attn package, version 3 or 2."
    )
    registry.add_attention(
        "flashinfer", "llmkit_attention.flashinfer:FlashInferAttention", doc="The flashinfer package."
    )
    registry.add_attention(
        "varlen", "llmkit_attention.varlen:VarlenAttention", doc="torch's varlen_attn, from torch 2.13 on, for CUDA."
    )


@hookimpl(trylast=True)
def llmkit_select_attention(requirements: AttentionRequirements) -> str | None:
    """The Triton kernels on CUDA where they can serve; else what runs everywhere. Anyone may bid something better."""
    return "flash" if requirements.device == "cuda" and not reasons_against(requirements) else "sdpa"
