"""Conversations: their text, which tokens are learned, and a model that answers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import TINY
from support.shown import blocks
from torch.nn import functional as F

import gpt_lightning
from gpt_lightning.data.corpus.chat import ANSWER, Chat, exchanges, render
from gpt_lightning.data.token_store import TokenStore, prepare
from gpt_lightning.data.tokenizer import BPE, Byte
from gpt_lightning.data.windows import IGNORE, EvalBatches, TrainBatches
from gpt_lightning.model.gpt import GPT, GPTConfig

E = 256  # end of text of Byte


def talk(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(contents)
    return {"messages": start + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


ROWS = [
    talk("Hi", " Hello! ", "Bye", "See you", "unanswered", system="Be kind"),
    {"prompt": "2+2", "response": "4"},
    *(talk(f"question {number}", f"answer {number}") for number in range(18)),
]
FIRST = [
    "<|system|>\nBe kind\n<|user|>\nHi\n<|assistant|>\nHello!",
    "<|user|>\nBye\n<|assistant|>\nSee you",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def store(path: Path, tmp_path: Path) -> TokenStore:
    return prepare(Chat(str(path)), Byte(), tmp_path / "cache")


def test_every_answer_is_a_document_and_validation_takes_whole_conversations(path: Path) -> None:
    corpus = Chat(str(path), val_fraction=0.5)  # every second conversation, from the second on
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert train[:3] == [*FIRST, "<|user|>\nquestion 0\n<|assistant|>\nanswer 0"]
    assert val[0] == "<|user|>\n2+2\n<|assistant|>\n4"
    assert len(train) + len(val) == 21
    packed = path.with_name("a.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(Chat(str(packed), val_fraction=0.5).documents("train")) == train


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"text": "x"}, "has neither `messages` nor `prompt` and `response`"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a `role` of system, user, assistant"),
        ({"messages": ["x"]}, "a message needs a text `content`"),
        ({"prompt": "x", "response": None}, "a message needs a text `content`"),
        (talk("x"), "has no message of the assistant"),
        (talk("say <|assistant|>", "no"), "they separate messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_that_is_no_conversation_is_refused_with_its_line(
    row: dict[str, Any], line: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(talk("a", "b")) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=r"a\.jsonl:2") as error:
        list(Chat(str(tmp_path / "a.jsonl")).documents("train"))
    assert line in str(error.value)


def test_other_files_are_refused(small_text: Path) -> None:
    with pytest.raises(ValueError, match=r"data=chat reads \.jsonl files"):
        list(Chat(str(small_text)).documents("train"))


def learned(store: TokenStore, targets: np.ndarray) -> str:
    """The text of the targets that count; # is the end of a document."""
    return "".join("#" if i == E else chr(i) for i in targets.tolist() if i != IGNORE)


def test_only_answers_and_their_ends_are_targets(store: TokenStore) -> None:
    answers = [text.partition(ANSWER)[2] + "#" for row in ROWS for text in exchanges(row, "")]
    train = [answer for number, answer in enumerate(answers) if number not in (10, 20)]  # every tenth row
    batches = TrainBatches(
        store, block_size=1, batch_size=1, micro_batch_size=1, steps=10**6, seed=1, shuffle=False
    )
    assert learned(store, np.array([int(batches[b][1]) for b in range(batches.windows)])) == "".join(train)
    for T in (7, 64):
        val = EvalBatches(store, block_size=T, micro_batch_size=3)
        targets = torch.cat([val[b][1].flatten() for b in range(len(val))]).numpy()
        assert learned(store, targets) == answers[10] + answers[20]


def test_tokens_of_a_prompt_have_no_gradient(store: TokenStore) -> None:
    net = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=1, n_embd=8))
    options: dict[str, Any] = {"block_size": 64, "batch_size": 4, "steps": 1, "seed": 1}
    x, y, count = TrainBatches(store, micro_batch_size=4, **options)[0]
    kept: list[torch.Tensor] = []
    net.lm_head.register_forward_hook(lambda *call: (call[2].retain_grad(), kept.append(call[2]))[0])
    (net(x, y, reduction="sum") / count).backward()
    assert kept[0].grad is not None
    gradient = kept[0].grad.view(4, 64, -1).abs().sum(-1)  # (B, T)
    assert (y == IGNORE).any()
    assert (gradient[y == IGNORE] == 0).all()
    assert (gradient[y != IGNORE] > 0).all()


@torch.no_grad()
def test_micro_batches_and_ranks_weigh_every_answer_token_alike(store: TokenStore) -> None:
    net = GPT(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8))
    options: dict[str, Any] = {"block_size": 8, "batch_size": 4, "steps": 1, "seed": 1}

    def total(micro_batch_size: int, micro_batches: int, **place: int) -> float:
        batches = TrainBatches(store, micro_batch_size=micro_batch_size, **place, **options)
        parts = (batches[b] for b in range(micro_batches))
        return sum(float(net(x, y, reduction="sum") / count) for x, y, count in parts)

    x, y, _ = TrainBatches(store, micro_batch_size=4, **options)[0]
    expected = float(F.cross_entropy(net(x).flatten(0, 1), y.flatten()))
    assert (y == IGNORE).all(1).any()  # a window without an answer, whose mean does not exist
    assert total(4, 1) == pytest.approx(expected, abs=1e-6)
    assert total(1, 4) / 4 == pytest.approx(expected, abs=1e-6)
    ranks = [total(1, 2, rank=rank, world_size=2) for rank in (0, 1)]
    assert sum(ranks) / 4 == pytest.approx(expected, abs=1e-6)


def test_learned_vocabulary_keeps_the_marker_apart(path: Path, tmp_path: Path) -> None:
    store = prepare(Chat(str(path)), BPE(280), tmp_path / "cache")
    assert EvalBatches(store, block_size=16, micro_batch_size=1).responses[0].shape == (2,)


def answer_loss(model: Any, path: Path) -> tuple[int, float]:
    """Number of tokens in the answers of the training conversations, and their mean loss, one by one."""
    losses, T = [], model.net.config.block_size
    for text in Chat(str(path)).documents("train"):
        ids = [E, *text.encode(), E]
        for place in range(len(ids) - len(text.split(ANSWER)[1].encode()) - 1, len(ids)):
            context = torch.tensor([ids[max(0, place - T) : place]])
            losses.append(-model.net(context)[0, -1].log_softmax(0)[ids[place]].item())
    return len(losses), float(np.mean(losses))


@pytest.mark.slow
def test_model_is_fine_tuned_to_answer_and_exported_with_its_template(
    call: Callable[..., Any],
    tiny: list[str],
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transformers = pytest.importorskip("transformers")
    call("train", *tiny, "logger=none", "trainer.max_steps=3")
    model = ("data=", "model.", "tokenizer=", "hydra.run.dir")
    shrunk = [text for text in TINY if not text.startswith(model)]
    start = ["data=chat", f"data.path={path}", f"init_from={tmp_path / 'run'}", "logger=none"]
    call("train", *shrunk, *start, f"hydra.run.dir={tmp_path / 'chat'}")
    loaded = gpt_lightning.load(tmp_path / "chat")
    assert loaded.info["chat"] is True
    scores = gpt_lightning.evaluate(f"checkpoint={tmp_path / 'chat'}", "split=train", "stride=1")
    assert scores["text"].endswith(", train, responses alone")
    assert (scores["tokens"], scores["loss"]) == pytest.approx(answer_loss(loaded, path), rel=1e-5)
    messages = ROWS[0]["messages"]
    answer = loaded.chat(messages, max_new_tokens=5, temperature=0)
    assert answer == loaded.generate(render(messages), max_new_tokens=5, temperature=0)
    (shown,) = blocks("chat", "python")
    capsys.readouterr()
    exec(shown.replace('"RUN"', repr(str(tmp_path / "chat"))), {})
    question = [{"role": "user", "content": "Who are you?"}]
    assert capsys.readouterr().out == loaded.chat(question, max_new_tokens=50) + "\n"
    call("export", f"checkpoint={tmp_path / 'chat'}", f"output={tmp_path / 'hf'}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == render(messages)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == loaded.encode(render(messages))
    # the tokens that it was trained on begin in the same way
    trained = [E, *(i for text in FIRST for i in (*text.encode(), E))]
    assert ids[: len(trained)] == trained
