"""The pictures of a report that show a search: the loss of each trial, and which keys mattered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_lightning.rundir.report import Result
from gpt_lightning.rundir.report_figures import LOSS, Figures, decorate, new_figure, without_formula

if TYPE_CHECKING:
    from optuna.study import Study

JOURNAL = "study.journal"  # of a search, in the directory of its sweep
LEAST_TRIALS = 5  # with a result, for importances


def study_figures(results: Sequence[Result]) -> Figures:
    """Headings and figures of the searches that runs belong to; none if there is no search, or no Optuna."""
    journals = sorted({result.folder.parent / JOURNAL for result in results})
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError:
        return
    for path in filter(Path.is_file, journals):
        storage = JournalStorage(JournalFileBackend(str(path)))
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            yield f"Search {path.parent.name}: loss by trial", _history(study)
            if importances := importances_of(study):
                yield f"Search {path.parent.name}: importance of each key", _bars(importances)


def importances_of(study: Study) -> dict[str, float]:
    """The share of each key in what makes trials good, by PED-ANOVA; empty if too few have a result."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if sum(math.isfinite(trial.values[0]) for trial in finished) < LEAST_TRIALS:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def _history(study: Study) -> Any:
    """Losses of finished and pruned trials, and the best of the finished ones so far."""
    figure = new_figure()
    axes = figure.subplots()
    for state, marker, name in (("COMPLETE", "o", "finished"), ("PRUNED", "x", "pruned, last validation")):
        points = [
            (trial.number, trial.values[0])
            for trial in study.trials
            if trial.state.name == state and trial.values and math.isfinite(trial.values[0])
        ]
        if not points:
            continue
        axes.scatter(*zip(*points, strict=True), marker=marker, label=name)
        if state == "COMPLETE":
            best = itertools.accumulate((loss for _, loss in points), min)
            axes.step([number for number, _ in points], list(best), where="post", label="best so far")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", frameon=False)
    decorate(axes, "trial", LOSS)
    return figure


def _bars(importances: dict[str, float]) -> Any:
    figure = new_figure(height=1 + 0.4 * len(importances))
    axes = figure.subplots()
    axes.barh([without_formula(key) for key in importances], list(importances.values()))
    axes.invert_yaxis()
    decorate(axes, "share of what tells the best trials from the others", "")
    return figure
