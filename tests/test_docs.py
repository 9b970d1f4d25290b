"""What docs/reliability.md says is tested, is."""

from __future__ import annotations

import re

import pytest
from support.runs import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [re.split(r" \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| ")][2:]
PROMISES = [(promise, name) for promise, tests in ROWS for name in re.findall(r"`([^`]+)`", tests)]


@pytest.mark.parametrize(("promise", "name"), PROMISES, ids=[name for _, name in PROMISES])
def test_promise_has_a_test_that_exists(promise: str, name: str) -> None:
    path, _, test = name.partition("::")
    code = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {test or 'test_.*'}\(", code, re.M), f"{promise}: {name}"


def test_every_promise_names_a_test_and_is_made_once() -> None:
    assert len(ROWS) > 20
    assert all(len(row) == 2 and re.fullmatch(r"`[^`]+`(, `[^`]+`)*", row[1]) for row in ROWS)
    assert len({promise for promise, _ in ROWS}) == len(ROWS)
