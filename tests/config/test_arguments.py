"""Names and types of arguments, against small classes written for the purpose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from omegaconf import OmegaConf

from gpt_lightning.config.nodes import check_arguments

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass
class Point:
    x: int
    _: KW_ONLY
    scale: float = 1.0
    label: str | None = None
    shown: bool = True
    kind: Literal["dot", "cross"] = "dot"
    sizes: Sequence[float] = ()
    folder: str | Path = "."
    limit: int | float = 1
    old: int = None  # type: ignore[assignment]  # as older code has it
    callback: Any = None
    part: Point | None = None


def anything(**options: Any) -> None: ...


def unknown(x: Decimal) -> None: ...


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"x": "three"}, "point.x='three' must be a whole number"),
        ({"x": 3.0}, "point.x=3.0 must be a whole number"),
        ({"x": True}, "point.x=True must be a whole number"),
        ({"x": None}, "point.x=None must be a whole number"),
        ({"x": [3]}, "point.x=[3] must be a whole number"),
        ({"scale": "big"}, "point.scale='big' must be a number"),
        ({"scale": False}, "point.scale=False must be a number"),
        ({"label": 3}, "point.label=3 must be text or null; quote it, as in point.label=\"'3'\""),
        ({"shown": 1}, "point.shown=1 must be true or false"),
        ({"kind": "star"}, "point.kind='star' must be dot or cross"),
        ({"sizes": 3}, "point.sizes=3 must be a list"),
        ({"sizes": "3"}, "point.sizes='3' must be a list"),
        ({"folder": {"a": 1}}, "point.folder={'a': 1} must be text"),
        ({"limit": "x"}, "point.limit='x' must be a number"),
        ({"old": "x"}, "point.old='x' must be a whole number or null"),
        ({"y": 1}, "point.y is no argument of Point; it takes x, scale, label, shown"),
        ({"scales": 1}, "point.scales is no argument of Point; did you mean scale?"),
    ],
)
def test_wrong_argument_is_named(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        check_arguments(Point, OmegaConf.create({"point": given}), "point", without=["callback"])


@pytest.mark.parametrize(
    "given",
    [
        {"x": 3, "scale": 2, "label": None, "kind": "cross", "sizes": [1, 2.5], "folder": "here"},
        {"x": -3, "scale": 2.5, "label": "a", "shown": False, "limit": 0.5, "old": None},
        {"callback": "any", "_target_": "Point", "_partial_": True},
        {"part": {"_target_": "Point", "x": 3}},
    ],
)
def test_good_arguments_pass(given: dict[str, Any]) -> None:
    check_arguments(Point, OmegaConf.create({"point": given}), "point")


def test_what_cannot_be_judged_passes() -> None:
    cfg = OmegaConf.create({"a": {"a": 1}, "b": {"x": "1.5"}})
    check_arguments(anything, cfg, "a")
    check_arguments(unknown, cfg, "b")  # its annotation exists for type checkers alone
    check_arguments(map, cfg, "b")  # it tells of no arguments


def test_key_is_the_one_that_the_user_set() -> None:
    cfg = OmegaConf.create(
        {"size": "wide", "page": {"x": "${size}"}, "point": {"x": "${page.x}", "scale": "${size}"}}
    )
    with pytest.raises(ValueError, match=r"^size='wide' must be a whole number"):
        check_arguments(Point, cfg, "point")
