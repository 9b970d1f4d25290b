"""Hydra looks for plugins in the namespace package hydra_plugins alone, so they are named here."""

from gpt_lightning.sweeping.launcher import ProcessLauncher
from gpt_lightning.sweeping.slurm import SlurmLauncher
from gpt_lightning.sweeping.sweeper import OptunaSweeper


class Processes(ProcessLauncher):
    """hydra/launcher=processes, the default of `train`."""


class Slurm(SlurmLauncher):
    """hydra/launcher=slurm."""


class Study(OptunaSweeper):
    """hydra/sweeper=study, which sweep=optuna chooses."""
