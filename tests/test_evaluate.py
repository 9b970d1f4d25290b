"""The command `evaluate`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import BYTES, random_net, save_checkpoint
from support.runs import ROOT

import gpt_lightning
from gpt_lightning.data.tales import Tales
from gpt_lightning.inference.inspection import attention, inspect
from gpt_lightning.inference.text import TextGenerator

Call = Callable[..., Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("any") / "best.ckpt", random_net())


@pytest.fixture
def score(call: Call, checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What the command writes as JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        path = tmp_path / "results" / "scores.json"
        call("evaluate", f"checkpoint={checkpoint}", "device=cpu", f"output={path}", *arguments)
        return json.loads(path.read_text())

    return run


def test_corpus_of_the_run_gives_its_validation_loss(
    call: Call, tiny: list[str], small_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    call("train", *tiny, "trainer.val_batches=null", "logger=none")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    call(
        "evaluate", f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}", "data=text", "device=cpu",
        f"data.path={small_text}", "stride=32", f"output={tmp_path / 'scores.json'}",
    )  # fmt: skip
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-6)
    shown = capsys.readouterr().out
    for value in (
        f"{found['loss']:.4f} nats per token",
        f"{found['perplexity']:.2f}",
        f"{found['tokens']:,}",
    ):
        assert value in shown


def test_run_alone_is_scored_on_its_own_validation_split(
    call: Call, tiny: list[str], tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "outputs" / "mine" / "a"
    options = [f"paths.outputs={tmp_path / 'outputs'}", "device=cpu", f"output={tmp_path / 'scores.json'}"]
    call("train", *tiny[:-1], f"hydra.run.dir={run}", "trainer.val_batches=null", "logger=none")
    summary = json.loads((run / "summary.json").read_text())
    for checkpoint in (run, "latest", "mine/latest"):
        capsys.readouterr()
        call("evaluate", f"checkpoint={checkpoint}", *options, "stride=32")
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["loss"] == pytest.approx(summary["best_val_loss"], rel=1e-6)
        assert "windows" not in capsys.readouterr().out
    call("evaluate", f"checkpoint={run}", *options)
    assert "or from at least 16 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("evaluate", "checkpoint=other/latest", *options)
    assert "there is no run with a checkpoint below" in capsys.readouterr().err


def test_run_is_evaluated_from_another_directory(
    call: Call, tiny: list[str], small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_text.parent)
    call("train", *tiny, f"data.path={small_text.name}", "trainer.val_batches=null", "logger=none")
    monkeypatch.chdir(tmp_path)
    found = gpt_lightning.evaluate("checkpoint=run", "stride=32")
    assert found["loss"] == pytest.approx(gpt_lightning.Run(tmp_path / "run").summary["val_loss"], rel=1e-6)


@pytest.mark.parametrize("target", ["os.mkdir", "gpt_lightning.data.corpus.base.select", "mine.Corpus"])
def test_corpus_of_another_package_is_not_built_from_a_checkpoint(
    target: str, call: Call, tmp_path: Path, capsys: Capture
) -> None:
    path = save_checkpoint(tmp_path / "best.ckpt", random_net())
    contents = torch.load(path, weights_only=True)
    floor = {"_target_": target, "path": str(tmp_path / "made")}
    corpus = {"_target_": "gpt_lightning.data.corpus.files.TextFiles", "path": "a.txt", "floor": floor}
    for node in (floor, corpus):
        contents["hyper_parameters"]["data"]["corpus"] = node
        torch.save(contents, path)
        with pytest.raises(SystemExit):
            call("evaluate", f"checkpoint={path}")
        assert "nothing to evaluate: " in capsys.readouterr().err
        assert not (tmp_path / "made").exists()


def test_training_text_in_text_is_warned_of(
    call: Call, tiny: list[str], small_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "texts").mkdir()
    story = small_text.read_text()
    for name, text in (("a.txt", story), ("b.txt", "one text more"), ("c.txt", story)):
        (tmp_path / "texts" / name).write_text(text)
    call("train", *tiny, f"data.path={tmp_path / 'texts'}", "data.val_fraction=0.4", "logger=none")
    for name, text, warned in (
        ("copy.txt", "one text more", True),
        ("same size.txt", "one text less", False),
        ("other.txt", "something else", False),
        ("excerpt.txt", story[3000:5000], True),
        ("with a line more.txt", f"{story[:2000]}\nA line of its own.", True),
        ("a part of it.txt", "A line of its own. " * 100 + story[700:2000], True),
        ("short.txt", story[:20], False),
    ):
        (tmp_path / name).write_text(text)
        capsys.readouterr()
        call("evaluate", f"checkpoint={tmp_path / 'run'}", f"text={tmp_path / name}", "device=cpu")
        assert ("has training text of the run" in capsys.readouterr().err) == warned


def test_text_and_corpus_give_the_same_scores(
    score: Callable[..., dict[str, Any]], small_text: Path, tmp_path: Path
) -> None:
    text = small_text.read_text()
    boundary = int(len(text) * 0.9)
    (tmp_path / "val.txt").write_text(text[boundary:])
    corpus = score("data=text", f"data.path={small_text}", "stride=8")
    file = score(f"text={tmp_path / 'val.txt'}", "stride=8", "batch_size=3")
    for key in ("tokens", "bytes", "loss", "perplexity", "bits_per_byte", "standard_error"):
        assert file[key] == pytest.approx(corpus[key], rel=1e-5), key
    assert score("data=text", f"data.path={small_text}", "split=train")["tokens"] == boundary - 1


def test_corpus_entropy_is_reported(score: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    stories = (ROOT / "input.txt").read_text().split("\n<|endoftext|>\n")[:20]
    (tmp_path / "input.txt").write_text("\n<|endoftext|>\n".join(stories))
    found = score("data=input_txt", f"data.path={tmp_path / 'input.txt'}")
    bits = [Tales().bits(story) for story in (stories[9], stories[19])]  # a tenth is for validation
    size = sum(len(story.encode()) for story in (stories[9], stories[19]))
    assert found["floor_bits_per_byte"] == pytest.approx(sum(bits) / size)
    assert found["bits_per_byte"] > found["floor_bits_per_byte"]


def test_only_a_file_of_results_is_replaced(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    others = {
        "samples.jsonl": json.dumps({"text": "abc"}) + "\n",
        "summary.json": json.dumps({"status": "finished", "val_loss": 1.0}, indent=2),
        "metrics.csv": "step,loss\n1,2.0\n",
    }
    for name, content in others.items():
        (tmp_path / name).write_text(content)
    arguments = [f"checkpoint={checkpoint}", "device=cpu", f"text={tmp_path / 'samples.jsonl'}"]
    for path in (checkpoint, *(tmp_path / name for name in others)):
        with pytest.raises(SystemExit):
            call("evaluate", *arguments, f"output={path}")
        line = capsys.readouterr().err
        reads = path.name == "samples.jsonl"
        assert ("is what this command reads;" if reads else "holds what this command did not write;") in line
    assert {name: (tmp_path / name).read_text() for name in others} == others
    (tmp_path / "new.json").touch()  # as mktemp leaves it
    for text in ("abc", "abcdef"):
        (tmp_path / "samples.jsonl").write_text(json.dumps({"text": text}) + "\n")
        call("evaluate", *arguments, f"output={tmp_path / 'new.json'}")
    assert json.loads((tmp_path / "new.json").read_text())["bytes"] == len("abcdef")


def test_bleu_against_references(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    said = ["the cat sat on the mat today", "it rained the whole long day"]
    meant = ["the cat sat on a mat today", "it rained all the long day"]
    (tmp_path / "said.txt").write_text("\n".join(said))
    (tmp_path / "meant.txt").write_text("\n".join(meant) + "\n")
    arguments = [f"samples={tmp_path / 'said.txt'}", f"reference={tmp_path / 'meant.txt'}"]
    call("evaluate", f"checkpoint={checkpoint}", "device=cpu", *arguments, f"output={tmp_path / 'bleu.json'}")
    found = json.loads((tmp_path / "bleu.json").read_text())
    assert found["bleu"] == sacrebleu.corpus_bleu(said, [meant]).score
    assert 0 < found["bleu"] < 100


def test_page_of_tokens_shows_losses_what_was_expected_and_attention(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: Capture, browser: Any
) -> None:
    (tmp_path / "<b>.txt").write_text("one <b>two</b>\nthree")
    options = [f"checkpoint={checkpoint}", f"text={tmp_path / '<b>.txt'}", "device=cpu", "tokens=true"]
    options += ["layer=1", "head=1", f"output={tmp_path / 'page.html'}"]
    for _ in range(2):  # a page is replaced
        call("evaluate", *options)
    loss = re.findall(r"loss  ([\d.]+) nats", capsys.readouterr().out)[0]
    page, requests = browser.new_page(viewport={"width": 390, "height": 800}), list[str]()
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    tokens, model = page.locator(".token"), TextGenerator(random_net(), BYTES)
    ids = [*b"one <b>two</b>\nthree"]
    seen, weights = inspect(model, ids), attention(model, ids, layer=1, head=1)
    assert weights is not None
    shown = tokens.evaluate_all("all => all.map(one => one.firstChild.textContent)")
    assert "".join(shown) == "one <b>two</b>↵\nthree"
    assert f"mean loss is {loss} nats" in page.locator("body").inner_text()
    heat = tokens.evaluate_all("all => all.map(one => Number(one.style.getPropertyValue('--heat')))")
    assert heat[1:] == pytest.approx([min(1, (n or 0) / math.log(257)) for n in seen.nats[1:]], abs=1e-3)
    assert not page.locator(".tip:visible").count()
    tokens.nth(4).hover()
    tip = page.locator(".tip:visible").inner_text().splitlines()
    assert tip[0] == f'"<"  {math.exp(-seen.nats[4]):.1%}, loss {seen.nats[4]:.3f} nats'
    assert [line.split()[0] for line in tip[2:]] == [f"{p:.1%}" for _, p in seen.expected[4]]
    page.get_by_label("Show the attention of layer 1, head 1").check()
    tokens.nth(4).hover()
    read = tokens.evaluate_all("all => all.map(one => Number(one.style.getPropertyValue('--weight')))")
    assert read == pytest.approx((weights[4] / weights[4].max()).tolist(), abs=1 / 255)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert requests == [(tmp_path / "page.html").as_uri()]
    page.close()
    (tmp_path / "page.html").write_text("<!doctype html>mine")
    with pytest.raises(SystemExit):
        call("evaluate", *options)
    assert (tmp_path / "page.html").read_text() == "<!doctype html>mine"
