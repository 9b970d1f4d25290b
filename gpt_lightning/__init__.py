"""Train GPT-2-style language models with PyTorch Lightning and Hydra.

A trained model in Python:

    from gpt_lightning import load

    model = load("outputs/gpt/2026-01-31_12-00-00/checkpoints/best.ckpt")
    print(model.generate("Once upon a time", max_new_tokens=100, temperature=0.8))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.inference.loading import load
    from gpt_lightning.inference.text import TextGenerator

__version__ = "0.1.0"
__all__ = ["TextGenerator", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """torch takes seconds to import, so what needs it waits until it is asked for."""
    if name in ("TextGenerator", "load"):
        from gpt_lightning.inference import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
