"""Train GPT-style language models with PyTorch Lightning and Hydra.

The commands are functions, with the overrides of the command line; `load` gives a trained model:

    import gpt_lightning

    run = gpt_lightning.train("model=tiny", "trainer.max_steps=200")
    print(run.summary["val_loss"], run.metrics["train/loss"])
    model = run.load()  # or gpt_lightning.load("outputs/gpt/2026-01-31_12-00-00")
    print(model.generate("Once upon a time", max_new_tokens=100, temperature=0.8))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.evaluation.losses import Result
    from gpt_lightning.inference.loading import load
    from gpt_lightning.inference.run import Run
    from gpt_lightning.inference.text import TextGenerator
    from gpt_lightning.plan import Plan
    from gpt_lightning.report import Report

    def train(*overrides: str) -> Run:
        """Train a run; returns it with its summary, its metrics and its folder."""

    def plan(*overrides: str) -> Plan:
        """What a run would cost, as numbers."""

    def report(*overrides: str) -> Report | None:
        """What runs found, best first; None if they were watched."""

    def evaluate(*overrides: str) -> Result:
        """How well a model predicts text, by the names that the table of the command has."""

    def generate(*overrides: str) -> list[str]:
        """Texts from a model, one for each prompt and sample."""


__version__ = "0.1.0"
__all__ = ["Run", "TextGenerator", "evaluate", "generate", "load", "plan", "report", "train"]

# torch takes seconds to import, so what needs it waits until it is asked for
_WHERE = {
    "load": "gpt_lightning.inference.loading",
    "Run": "gpt_lightning.inference.run",
    "TextGenerator": "gpt_lightning.inference.text",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in __all__:  # a command, whose module can be called
        return importlib.import_module(f"gpt_lightning.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
