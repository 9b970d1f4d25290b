"""Whether two run directories hold the same run: every bit that no clock measured."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.util import tensor_util

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics

MEASURED = {"seconds", "tokens_per_second", "git_revision", "slurm_job", "overrides"}  # in summary.json
# what a resumed run may be told to do otherwise, though its result is the same
HARMLESS = {"num_workers", "time_limit", "resume", "trust", "paths"}
VARYING = ("tensorboard/", "checkpoints/last-", ".hydra/", "train.log")  # files that need not be in both


def differences(run: Path, reference: Path) -> list[str]:
    """What differs between two runs, in one short text each; empty if they are the same run.

    The run directory may have been moved, within its parent.
    """
    parts = (_files, _checkpoints, _metrics, _tensorboard, _texts, _summary, _hydra)
    return [problem for part in parts for problem in part(run, reference)]


def unequal(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two trees differ, tensors compared bit for bit and NaN equal to itself."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            yield path
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key not in a or key not in b:
                yield f"{path}/{key} (in one of them only)"
            else:
                yield from unequal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield f"{path} ({len(a)} and {len(b)} items)"
        for number, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from unequal(one, other, f"{path}/{number}")
    elif a != b and not (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
        yield f"{path} ({a!r:.60} and {b!r:.60})"


def placeless(value: Any, folder: Path) -> Any:
    """A tree with the path of the run directory replaced, and without what a resumed run may change."""
    if isinstance(value, str):
        return re.sub(rf"{re.escape(str(folder.parent))}/[^/]+", "RUN", value)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in HARMLESS}
        return {placeless(key, folder): placeless(item, folder) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [placeless(item, folder) for item in value]
    return value


def _files(run: Path, reference: Path) -> Iterator[str]:
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (run, reference)
    ]
    extra = {name for name in names[0] ^ names[1] if not name.startswith(VARYING)}
    yield from (f"{name} is in one of them only" for name in sorted(extra))
    yield from (f"{path} was left" for path in run.rglob("*.tmp"))


def _checkpoints(run: Path, reference: Path) -> Iterator[str]:
    for path in sorted((run / "checkpoints").glob("*.ckpt")):
        other = reference / "checkpoints" / path.name
        if path.name.startswith("last-") or not other.exists():
            continue  # an interruption writes additional ones, and a damaged last.ckpt becomes an older one
        a, b = read_checkpoint(path), read_checkpoint(other)  # raises if one is damaged
        found = [
            place
            for place in unequal(placeless(a, run), placeless(b, reference))
            if "val_loop.batch_progress/total/" not in place  # counts what an interrupted validation began
        ]
        if found:
            yield f"{path.name} differs at {', '.join(found[:4])} ({len(found)} places)"


def _metrics(run: Path, reference: Path) -> Iterator[str]:
    a, b = (
        [
            {key: value for key, value in row.items() if not key.startswith("speed/")}
            for row in read_metrics(folder / "metrics.csv")
        ]
        for folder in (run, reference)
    )
    yield from (f"metrics.csv differs at row {place}" for place in list(unequal(a, b))[:3])


def _tensorboard(run: Path, reference: Path) -> Iterator[str]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells what it leaves out after a restart
    for reader in (_shown, _shown_by_the_older_reader):
        if not all((folder / "tensorboard").exists() for folder in (run, reference)):
            break  # without this logger
        a, b = reader(run / "tensorboard"), reader(reference / "tensorboard")
        found = list(unequal(a, b))
        if found:
            yield f"TensorBoard ({reader.__name__}) differs at {', '.join(found[:3])}"


def _last_of_hparams(tag: str, points: list[Any]) -> list[Any]:
    """The page of hyper-parameters shows the last results; an interrupted run has some too."""
    return points[-1:] if tag.startswith("hparams/") else points


def _shown(folder: Path) -> dict[str, list[Any]]:
    """Scalars and texts as TensorBoard's own server reads them."""
    size = {plugin_event_accumulator.TENSORS: 0}
    events = plugin_event_accumulator.EventAccumulator(str(folder), tensor_size_guidance=size)
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        if not tag.startswith(("speed/", "_hparams_/")):
            points = [
                (event.step, tensor_util.make_ndarray(event.tensor_proto).tolist())
                for event in events.Tensors(tag)
            ]
            found[tag] = _last_of_hparams(tag, points)
    return found


def _shown_by_the_older_reader(folder: Path) -> dict[str, list[Any]]:
    """Scalars as TensorBoard's older reader, which notebooks use, returns them."""
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={event_accumulator.SCALARS: 0})
    events.Reload()
    return {
        tag: _last_of_hparams(tag, [(event.step, event.value) for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
        if not tag.startswith("speed/")
    }


def _texts(run: Path, reference: Path) -> Iterator[str]:
    # the title of curves.png is the name of the directory
    for name in ("samples.md", *(["curves.png"] if run.name == reference.name else [])):
        a, b = (
            (folder / name).read_bytes() if (folder / name).exists() else None for folder in (run, reference)
        )
        if a != b:
            yield f"{name} differs"


def _summary(run: Path, reference: Path) -> Iterator[str]:
    a, b = (
        placeless(json.loads((folder / "summary.json").read_text()), folder) for folder in (run, reference)
    )
    found = unequal(*({k: v for k, v in one.items() if k not in MEASURED} for one in (a, b)))
    yield from (f"summary.json differs at {place}" for place in found)
    if MEASURED & a.keys() != MEASURED & b.keys() or not a["seconds"] > 0:
        yield "summary.json lacks what was measured"


def _hydra(run: Path, reference: Path) -> Iterator[str]:
    for name in ("config.yaml", "overrides.yaml"):
        a, b = ((folder / ".hydra" / name).read_text() for folder in (run, reference))
        # the run may have begun in a directory of another name
        a, b = (re.sub(r"hydra.run.dir=.*", "", text) for text in (a, b))
        if a != b:
            yield f".hydra/{name} differs"


def charts(events: Any) -> dict[str, list[str]]:
    """The charts of TensorBoard's page Custom Scalars, and the patterns of the tags in each."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (event,) = events.Tensors("custom_scalars__config__")
    categories = Layout.FromString(event.tensor_proto.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for part in categories for chart in part.chart}


def hyperparameters(folder: Path) -> list[dict[str, float | str]]:
    """Every start of a session on the HParams page, in all event files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = []
    for path in sorted(folder.glob("events.*")):
        values = (value for event in EventFileLoader(str(path)).Load() for value in event.summary.value)
        for value in (value for value in values if value.tag == "_hparams_/session_start_info"):
            data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            columns = data.session_start_info.hparams
            found.append({key: getattr(v, v.WhichOneof("kind")) for key, v in columns.items()})
    return found
