"""Built-in attention backends; registered by an entry point like anyone else's. Torch-free: backends load lazily."""

from llmkit import AttentionRequirements, Registry, hookimpl


@hookimpl
def llmkit_register(registry: Registry) -> None:
    registry.add_attention(
        "sdpa", "llmkit_attention.sdpa:SdpaAttention", doc="PyTorch's scaled dot product attention, on any device."
    )


@hookimpl(trylast=True)
def llmkit_select_attention(requirements: AttentionRequirements) -> str | None:
    """What runs everywhere, if nobody has bid for something better."""
    return "sdpa"
