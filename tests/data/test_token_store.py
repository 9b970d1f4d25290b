"""The token store: layout, cache, crashes, shards."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from support.hub import dataset

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.huggingface import HuggingFace
from gpt_lightning.data.corpus.shakespeare import Shakespeare
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.shards import prepare_shard
from gpt_lightning.data.token_store import GROUP, TokenStore, prepare
from gpt_lightning.data.tokenizer import BPE, GPT2, Byte, Char, FixedTokenizer

ROOT = Path(__file__).parents[2]
TIKTOKEN = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ROOT / "../shared/tiktoken_cache"))
SHAKESPEARE = ROOT / "../shared/data/tinyshakespeare/input.txt"
STORIES = ROOT / "../shared/data/tinystories/hub"
needs_gpt2 = pytest.mark.skipif(not TIKTOKEN.is_dir(), reason=f"no vocabulary of GPT-2 in {TIKTOKEN}")
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"{SHAKESPEARE} is not here")
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")

DOCUMENTS = ["one", "zwölf", "a\nb", "four"]
E = 256  # end of text of Byte


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture
def stories(tmp_path) -> TextFiles:
    """Four documents, of which the last is for validation."""
    return TextFiles(write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(DOCUMENTS)), val_fraction=0.25)


@pytest.fixture
def larger(tmp_path) -> TextFiles:
    """About 4 MB in documents of all sizes, so that many groups of them are encoded."""
    random.seed(1)
    texts = ["abcdefgh \n"[: random.randint(1, 10)] * random.randint(1, 1000) for _ in range(1300)]
    lines = "\n".join(json.dumps({"text": f"{i} {text}"}) for i, text in enumerate(texts))
    return TextFiles(write(tmp_path / "a.jsonl", lines))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_lie_between_end_of_text_tokens(stories, tmp_path):
    store = prepare(stories, Byte(), tmp_path / "cache")
    expected = [E]
    for text in DOCUMENTS[:3]:
        expected += [*text.encode(), E]
    assert store.tokens("train").tolist() == expected
    assert store.tokens("val").tolist() == [E, *b"four", E]
    assert np.fromfile(store.folder / "train.bin", "<u2").tolist() == expected


def test_meta_counts_tokens_documents_and_bytes_of_text(stories, tmp_path):
    store = prepare(stories, Byte(), tmp_path / "cache")
    train, val = store.meta.splits["train"], store.meta.splits["val"]
    assert (train.tokens, train.bytes, train.documents, train.floor_bits) == (16, 12, 3, None)
    assert (val.tokens, val.bytes, val.documents) == (6, 4, 1)
    assert (store.n_vocab, store.meta.corpus_digest) == (257, stories.digest())
    assert store.meta.tokenizer_digest == tokenizers.digest(store.tokenizer)
    assert store.floor_bits_per_byte("train") is None


def test_one_text_is_laid_out_without_separators(tmp_path):
    text = "Some words, é and more. " * 200_000  # several pieces
    store = prepare(TextFiles(write(tmp_path / "a.txt", text)), Byte(), tmp_path / "cache")
    boundary = int(len(text) * 0.9)
    assert store.tokens("train").astype(np.uint8).tobytes() == text[:boundary].encode()
    assert store.tokens("val").astype(np.uint8).tobytes() == text[boundary:].encode()
    assert store.meta.splits["train"].documents == 1


def test_groups_of_documents_are_stored_in_order(larger, tmp_path):
    store = prepare(larger, Byte(), tmp_path / "cache", threads=3)
    tokens = store.tokens("train")
    assert len(tokens) > 5 * GROUP
    before, *texts = np.split(tokens.astype(np.int64), np.flatnonzero(tokens == E))
    assert len(before) == 0
    assert [bytes(text[1:].tolist()).decode() for text in texts] == [*larger.documents("train"), ""]


@needs_shakespeare
@needs_gpt2
def test_tiny_shakespeare_has_the_published_number_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    store = prepare(Shakespeare(path=str(SHAKESPEARE)), GPT2(), tmp_path)
    assert (len(store.tokens("train")), len(store.tokens("val"))) == (301_966, 36_059)
    assert (store.tokens("train").dtype, store.n_vocab) == (np.uint16, 50257)
    text = SHAKESPEARE.read_text(encoding="utf-8")
    assert store.tokenizer.decode(store.tokens("val").tolist()) == text[int(len(text) * 0.9) :]


@needs_stories
def test_dataset_folder_makes_a_store(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    store = prepare(HuggingFace(str(STORIES), val_split="validation"), BPE(512), tmp_path / "cache")
    assert (store.meta.splits["train"].documents, store.meta.splits["val"].documents) == (178, 20)
    assert store.n_vocab == 512


def test_large_vocabulary_takes_32_bits(stories, tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"\xff" + i.to_bytes(3, "big"): i for i in range(256, 70_000)}
    encoding = tiktoken.Encoding(
        "large", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000}
    )
    store = prepare(stories, FixedTokenizer(encoding), tmp_path / "cache")
    assert store.tokens("val").dtype == np.uint32
    assert store.tokens("val").tolist() == [70_000, *b"four", 70_000]
    assert (store.folder / "val.bin").stat().st_size == 6 * 4


def test_floor_is_summed_over_documents(tmp_path):
    from gpt_lightning.data.tales import Tales

    tales = Tales(seed=3, stories=20)
    path = write(tmp_path / "a.txt", tales.text())
    store = prepare(TextFiles(path, floor=tales), Byte(), tmp_path / "cache")
    stories = list(tales.stories_with_bits())
    val = [stories[9], stories[19]]
    floor = sum(bits for _, bits in val) / sum(len(story.encode()) for story, _ in val)
    assert store.floor_bits_per_byte("val") == pytest.approx(floor, rel=1e-12)
    assert prepare(TextFiles(path), Byte(), tmp_path / "cache").floor_bits_per_byte("val") is None
    other = write(tmp_path / "b.txt", tales.text() + "<|endoftext|>\nA text of another source.")
    store = prepare(TextFiles(other, floor=tales), Byte(), tmp_path / "cache")
    assert store.floor_bits_per_byte("train") is None
    assert store.floor_bits_per_byte("val") == pytest.approx(floor, rel=1e-12)


def test_pickled_store_holds_no_tokens(larger, tmp_path):
    store = prepare(larger, Byte(), tmp_path / "cache")
    pickled = pickle.dumps(store)
    assert len(pickled) < 20_000
    assert np.array_equal(pickle.loads(pickled).tokens("val"), store.tokens("val"))


def test_mapped_tokens_cannot_be_changed(stories, tmp_path):
    tokens = prepare(stories, Byte(), tmp_path / "cache").tokens("train")
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


# -- cache -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Untrainable(BPE):
    """A tokenizer with the cache key of BPE that fails when it is trained."""

    def build(self, documents: tokenizers.Documents) -> tiktoken.Encoding:
        raise AssertionError("trained again")


def test_second_run_takes_tokenizer_and_tokens_from_the_cache(stories, tmp_path):
    first = prepare(stories, BPE(258), tmp_path / "cache")
    for lock in (tmp_path / "cache").rglob("*.lock"):
        lock.unlink()  # a cache that cannot be written is enough
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again = prepare(TextFiles(stories.path, val_fraction=0.25), Untrainable(258), tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert again.folder == first.folder
    assert again.tokenizer.encode_ordinary("one") == first.tokenizer.encode_ordinary("one")


def test_changed_text_or_split_makes_another_store(stories, tmp_path):
    first = prepare(stories, BPE(258), tmp_path / "cache")
    other = prepare(TextFiles(stories.path, val_fraction=0.5), BPE(258), tmp_path / "cache")
    write(Path(str(stories.path)), "\n<|endoftext|>\n".join([*DOCUMENTS, "five"]))
    third = prepare(TextFiles(stories.path, val_fraction=0.5), BPE(258), tmp_path / "cache")
    assert len({first.folder, other.folder, third.folder}) == 3
    assert "five" in third.tokenizer.decode(third.tokens("train").tolist())


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "train.bin", 10),
        lambda folder: (folder / "val.bin").unlink(),
        lambda folder: _flip(folder / "val.bin"),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "meta.json").write_text('{"splits": {"train": {}, "val": {}}}'),
        lambda folder: _edit_meta(folder, corpus_digest="0" * 64),
        lambda folder: _edit_meta(folder, tokenizer_digest="0" * 64),
        lambda folder: _edit_meta(folder, version=0),
        lambda folder: (folder / "meta.json").write_bytes(
            (folder / "meta.json").read_bytes().replace(b'"bytes": 12', b'"bytes": 13')
        ),
    ],
)
def test_damaged_or_foreign_store_is_built_again_with_a_warning(stories, tmp_path, caplog, damage):
    folder = prepare(stories, Byte(), tmp_path / "cache").folder
    whole = files_of(folder)
    damage(folder)
    assert files_of(folder) != whole
    store = prepare(stories, Byte(), tmp_path / "cache")
    assert files_of(store.folder) == whole
    assert caplog.text.count("cannot be used") == 1
    assert str(folder) in caplog.text
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def _edit_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_bytes())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def test_large_file_is_not_read_when_opened_but_its_size_is_checked(stories, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("gpt_lightning.data.token_store.VERIFY_BELOW", 0)
    folder = prepare(stories, Byte(), tmp_path / "cache").folder
    whole = files_of(folder)
    _flip(folder / "val.bin")
    prepare(stories, Byte(), tmp_path / "cache")
    assert files_of(folder) != whole
    os.truncate(folder / "train.bin", 10)
    prepare(stories, Byte(), tmp_path / "cache")
    assert files_of(folder) == whole
    assert "train.bin has 10 bytes instead of 32" in caplog.text


def test_damaged_tokenizer_is_trained_again_with_a_warning(stories, tmp_path, caplog):
    first = prepare(stories, BPE(258), tmp_path / "cache")
    (saved,) = (tmp_path / "cache/tokenizers").glob("*.json")
    os.truncate(saved, 100)
    assert prepare(stories, BPE(258), tmp_path / "cache").folder == first.folder
    assert "is not a saved tokenizer" in caplog.text
    assert tokenizers.digest(tokenizers.load(saved)) == first.meta.tokenizer_digest


def test_cache_that_cannot_be_written_gives_one_clear_line(stories, tmp_path):
    file = write(tmp_path / "file", "x")
    for tokenizer in (Byte(), Char()):
        with pytest.raises(OSError, match=r"cannot write to the token cache .*set paths.cache=") as caught:
            prepare(stories, tokenizer, Path(file))
        assert "\n" not in str(caught.value)


def test_error_of_the_corpus_leaves_nothing_behind(stories, tmp_path):
    @dataclass(frozen=True)
    class Broken(TextFiles):
        def documents(self, split: str) -> Iterator[str]:
            yield "one"
            raise OSError("the text is gone")

    with pytest.raises(OSError, match=r"^the text is gone$"):
        prepare(Broken(stories.path), Byte(), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@dataclass(frozen=True)
class Changing(TextFiles):
    """Writes its file while a certain call of `documents` is read."""

    call: int = 1
    writes: tuple[bytes, ...] = ()

    def documents(self, split: str) -> Iterator[str]:
        calls = self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        for document in super().documents(split):
            yield document
            if calls == self.call:
                for content in self.writes:
                    Path(str(self.path)).write_bytes(content)
                    os.utime(str(self.path))


class Own:
    """A corpus of a user's, whose text changes when it is read."""

    separated = True

    def __init__(self) -> None:
        self.text = "before"

    def digest(self) -> str:
        return self.text

    def documents(self, split: str) -> Iterator[str]:
        self.text = "after"
        yield self.text

    def floor_bits(self, document: str) -> None:
        return None


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("prepares", [prepare, partial(prepare_shard, shard=0, shards=2)])
@pytest.mark.parametrize("call", [1, 2, 3], ids=["vocabulary", "train", "val"])
def test_text_that_changes_while_it_is_read_leaves_nothing(stories, tmp_path, call, prepares, restored):
    before = Path(stories.path).read_bytes()
    writes = (before.replace(b"one", b"two"), *([before] if restored else []))
    corpus = Changing(stories.path, val_fraction=0.25, call=call, writes=writes)
    with pytest.raises(ValueError, match=r"a\.txt changed while it was read, so nothing .* start again"):
        prepares(corpus, BPE(258), tmp_path / "cache")
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.suffix not in (".lock", "")]
    assert [file.parent.name for file in kept] == ["tokenizers"] * (call > 1)  # learned before the change
    assert not list((tmp_path / "cache").glob("*.part-*-of-2"))


def test_own_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the text of data\.corpus changed while it was read"):
        prepare(Own(), Byte(), tmp_path / "cache")


# -- real processes ----------------------------------------------------------------------------------

SCRIPT = """
import logging, resource, sys
from pathlib import Path
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.huggingface import HuggingFace
from gpt_lightning.data.shards import prepare_shard
from gpt_lightning.data.token_store import prepare
from gpt_lightning.data.tokenizer import BPE, Byte

logging.basicConfig(level=logging.INFO)
path, cache = sys.argv[1], Path(sys.argv[2])

class Logged(TextFiles):
    def documents(self, split):
        (Path(path).parent / "reads.txt").open("a").write(split + "\\n")
        return super().documents(split)
"""


def start(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT + code, *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env and os.environ | env,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


def test_concurrent_processes_build_a_store_once(larger, tmp_path):
    code = "prepare(Logged(path), BPE(300), cache)"
    for process in [start(code, larger.path, tmp_path / "cache") for _ in range(3)]:
        finish(process)
    reads = (tmp_path / "reads.txt").read_text().split()
    assert reads == ["train", "train"]  # to train the tokenizer, and both splits to encode
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.name != "tokenizers")
    assert files_of(folder) == files_of(prepare(larger, BPE(300), tmp_path / "own cache").folder)


@pytest.mark.slow
def test_killed_preparation_leaves_no_incomplete_store(larger, tmp_path):
    expected = files_of(prepare(larger, BPE(300), tmp_path / "own cache").folder)
    cache = tmp_path / "cache"
    random.seed(2)
    kills = 0
    while kills < 3:
        process = start("prepare(TextFiles(path), BPE(300), cache)", larger.path, cache)
        _wait_for_half_a_store(cache, process)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        for folder in (path for path in cache.iterdir() if path.is_dir() and path.name != "tokenizers"):
            if folder.suffix != ".tmp":  # it was killed after the work, or not at all; begin again
                assert files_of(folder) == expected
                shutil.rmtree(folder)
    assert files_of(prepare(larger, BPE(300), cache).folder) == expected
    assert not any(path.suffix in (".tmp", ".old") for path in cache.rglob("*"))


def _wait_for_half_a_store(cache: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(cache.glob("*.tmp/*.bin")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_full_disk_gives_one_clear_line_and_leaves_no_store(larger, tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # the system refuses as a full disk does
prepare(TextFiles(path), Byte(), cache)
"""
    process = start(code, larger.path, tmp_path / "cache")
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith(f"OSError: cannot write to the token cache {tmp_path / 'cache'}")
    assert "make room" in last
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"
)
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = """
prepare(TextFiles(path), Byte(), cache, threads=2)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    peaks = {}
    for megabytes in (10, 50):
        for name, end in (("text", ""), ("documents", "<|endoftext|>")):
            text = ("words of a long text, " * 45 + "\n" + end) * (megabytes * 1000)
            process = start(code, write(tmp_path / f"{name}.txt", text), tmp_path / f"{name}{megabytes}")
            peaks[name, megabytes] = int(finish(process)[0])  # KiB
    for name in ("text", "documents"):
        assert peaks[name, 50] - peaks[name, 10] < 20_000


# -- shards ------------------------------------------------------------------------------------------


def test_shards_merge_into_the_bytes_of_one_run(larger, tmp_path):
    text = TextFiles(write(tmp_path / "b.txt", "words and spaces " * 300_000))
    for corpus in (larger, text):
        expected = files_of(prepare(corpus, BPE(300), tmp_path / "one").folder)
        results = [
            prepare_shard(corpus, BPE(300), tmp_path / "many", shard=shard, shards=4)
            for shard in (2, 0, 3, 0, 1)
        ]
        assert results[:4] == [None] * 4
        assert isinstance(results[4], TokenStore)
        assert files_of(results[4].folder) == expected
        again = prepare_shard(corpus, BPE(300), tmp_path / "many", shard=2, shards=4)
        assert again is not None
        assert again.meta == results[4].meta
    assert not list((tmp_path / "many").glob("*.part-?-of-4"))


def test_shards_of_a_small_corpus_may_be_empty(stories, tmp_path):
    expected = files_of(prepare(stories, Byte(), tmp_path / "one").folder)
    results = [prepare_shard(stories, Byte(), tmp_path / "many", shard=i, shards=3) for i in range(3)]
    assert results[:2] == [None, None]
    assert results[2] is not None
    assert files_of(results[2].folder) == expected


@dataclass(frozen=True)
class Recorded:
    """A corpus that notes which of its parts are read."""

    corpus: TextFiles | HuggingFace
    read: list[tuple[str, int]]
    separated = True

    def digest(self):
        return self.corpus.digest()

    def documents(self, split):
        found = self.corpus.documents(split)
        name = split if found.fraction is None else "both"

        def noted(part, number):
            self.read.append((name, number))
            return part()

        return replace(found, parts=[partial(noted, part, n) for n, part in enumerate(found.parts)])

    def floor_bits(self, document):
        return -float(len(document)) / 3


def hub_folder(folder: Path) -> Path:
    """A dataset in the layout of the hub: four files of three row groups, and one of validation."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir(parents=True)
    random.seed(2)
    names = [f"train-{i:05}-of-00004.parquet" for i in range(4)] + ["validation-00000-of-00001.parquet"]
    for name in names:
        texts = [random.choice(["", " ", "a", "words é "]) * random.randint(1, 300) for _ in range(300)]
        table = pyarrow.table({"id": range(300), "text": texts})
        parquet.write_table(table, folder / "data" / name, row_group_size=100)
    return folder


CORPORA = {
    "row groups": (lambda hub: TextFiles(f"{hub}/data/train-0000[01]*"), 6),
    "row groups and a text of validation": (
        lambda hub: TextFiles(f"{hub}/data", val_path=f"{hub}/data/validation*"),
        15,
    ),
    "files": (lambda hub: TextFiles(f"{hub}/lines"), 4),
    "rows of a dataset": (lambda hub: HuggingFace(str(hub)), 12),
    "files of a dataset that streams": (lambda hub: HuggingFace(str(hub), streaming=True), 4),
    "a dataset that streams and has both splits": (
        lambda hub: HuggingFace(str(hub), streaming=True, val_split="validation"),
        5,
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_each_shard_reads_its_own_parts(tmp_path, monkeypatch, name):
    monkeypatch.setattr("gpt_lightning.data.corpus.files.PART", 1)
    monkeypatch.setattr("gpt_lightning.data.corpus.huggingface.ROWS", 100)
    if "dataset" in name:
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    hub = hub_folder(tmp_path / "hub")
    (hub / "lines").mkdir()
    for i in range(4):
        lines = (json.dumps({"text": f"{j} " * (j % 7)}) + "\n" for j in range(i, 200))
        write(hub / "lines" / f"{i}.jsonl", "".join(lines))
    make, parts = CORPORA[name]
    one = Recorded(make(hub), [])
    store = prepare(one, Byte(), tmp_path / "one")
    assert len(one.read) == len(set(one.read)) == parts  # each is read once
    for split in ("train", "val"):  # as they are read without parts
        expected = [E, *(i for text in one.corpus.documents(split) for i in [*text.encode(), E])]
        assert store.tokens(split).tolist() == expected
    read: list[tuple[str, int]] = []
    for shard in (2, 0, 1):
        found = Recorded(make(hub), [])
        many = prepare_shard(found, Byte(), tmp_path / "many", shard=shard, shards=3)
        found.read[:] = [(name, n) for name, n in found.read if name != "val"]  # may have fewer parts
        assert {number % 3 for _, number in found.read} == {shard}
        read += found.read
    assert sorted(read) == sorted((name, number) for name, number in one.read if name != "val")
    assert many is not None
    assert files_of(many.folder) == files_of(store.folder)


def test_more_shards_than_parts_share_the_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_lightning.data.token_store.GROUP", 100)
    corpus = TextFiles(f"{hub_folder(tmp_path / 'hub')}/data/validation*")
    expected = files_of(prepare(corpus, Byte(), tmp_path / "one").folder)
    stores = [prepare_shard(corpus, Byte(), tmp_path / "many", shard=i, shards=5) for i in range(5)]
    assert files_of(stores[-1].folder) == expected


def test_streamed_dataset_of_several_files_is_prepared_in_parts_and_goes_on_after_the_finished_ones(tmp_path):
    stories = [f"{number} " + "word " * 20_000 for number in range(30)]
    hub = dataset(tmp_path / "hub", [stories[:10], stories[10:20], stories[20:]])
    corpus, cache = HuggingFace(str(hub), streaming=True), tmp_path / "cache"
    assert prepare_shard(corpus, Byte(), cache, shard=1, shards=2) is None
    (done,) = cache.glob("*.part-1-of-2/groups.bin")
    code = """
from gpt_lightning.data import shards
import os, signal
shards.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # when all tokens are written
prepare_shard(HuggingFace(path, streaming=True), Byte(), cache, shard=0, shards=2)
"""
    process = start(code, hub, cache)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(cache.glob("*.part-0-of-2*/groups.bin"))
    before = done.stat().st_mtime_ns
    assert prepare_shard(corpus, Byte(), cache, shard=1, shards=2) is None
    assert done.stat().st_mtime_ns == before
    store = prepare_shard(corpus, Byte(), cache, shard=0, shards=2)
    assert store is not None
    train = [story for number, story in enumerate(stories) if (number + 1) % 10]
    expected = [E, *(i for story in train for i in (*story.encode(), E))]
    assert store.tokens("train").tolist() == expected  # all files in order, none of it twice


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("groups.bin", lambda path: _flip(path)),
        ("groups.bin", lambda path: os.truncate(path, path.stat().st_size // 2)),
        ("groups.bin", lambda path: path.write_bytes(path.read_bytes() + b"\0\0")),
        ("groups.bin", lambda path: path.unlink()),
        ("part.json", lambda path: _flip(path)),
        ("part.json", lambda path: path.write_bytes(path.read_bytes()[:50])),
    ],
)
def test_damaged_part_is_named_and_can_be_prepared_again(larger, tmp_path, caplog, name, damage):
    def shard(number: int) -> TokenStore | None:
        return prepare_shard(larger, Byte(), tmp_path / "many", shard=number, shards=2)

    assert shard(0) is None
    (part,) = (tmp_path / "many").glob("*.part-0-of-2")
    damage(part / name)
    line = rf"{part} is damaged \(.*\); prepare it again with shard=0 shards=2$"
    for _ in range(2):
        with pytest.raises(ValueError, match=line):
            shard(1)
    store = shard(0)
    assert re.search(line, caplog.text, re.MULTILINE)
    assert store is not None
    assert files_of(store.folder) == files_of(prepare(larger, Byte(), tmp_path / "one").folder)


@pytest.mark.parametrize(
    ("shard", "shards", "line"),
    [
        (-1, 4, "shard=-1 must be a whole number from 0 to 3, since shards=4"),
        (4, 4, "shard=4 must be a whole number from 0 to 3, since shards=4"),
        (0, 0, "shards=0 must be a whole number from 1 to 512"),
        (0, 1_000_000_000, "shards=1000000000 must be a whole number from 1 to 512"),
    ],
)
def test_shard_out_of_range_is_refused(stories, tmp_path, shard, shards, line):
    with pytest.raises(ValueError, match=line):
        prepare_shard(stories, Byte(), tmp_path, shard=shard, shards=shards)


# -- token files from elsewhere ----------------------------------------------------------------------


def write_bins(folder: Path, train: list[int], val: list[int]) -> TokenBins:
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"not to be opened")
    return TokenBins(str(folder))


def test_folder_of_token_files_is_used_in_place(tmp_path):
    train, val = [*"zwölf".encode(), E, *b"a"], [*b"four", E, E]
    store = prepare(write_bins(tmp_path, train, val), Byte(), tmp_path / "cache")
    assert (store.tokens("train").tolist(), store.tokens("val").tolist()) == (train, val)
    assert store.folder == tmp_path
    assert not (tmp_path / "cache").exists()
    splits = store.meta.splits
    assert [splits["train"].tokens, splits["train"].bytes, splits["train"].documents] == [8, 7, 1]
    assert [splits["val"].tokens, splits["val"].bytes, splits["val"].documents] == [6, 4, 2]
    np.array([1], dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert prepare(TokenBins(str(tmp_path)), Byte(), tmp_path).meta.corpus_digest != store.meta.corpus_digest


def test_id_outside_the_vocabulary_gives_one_clear_line(tmp_path):
    corpus = write_bins(tmp_path, [1, 2], [3, 257, 4])
    with pytest.raises(
        ValueError, match=r"val.bin has the token id 257, but tokenizer=byte has 257; choose the"
    ):
        prepare(corpus, Byte(), tmp_path)


def test_token_files_refuse_trained_tokenizers_and_shards(tmp_path):
    corpus = write_bins(tmp_path, [1, 2], [3])
    with pytest.raises(ValueError, match=r"holds token ids, not text .* such as tokenizer=gpt2"):
        prepare(corpus, BPE(), tmp_path)
    with pytest.raises(ValueError, match="is tokenized already; use it without shards"):
        prepare_shard(corpus, Byte(), tmp_path, shard=0, shards=2)
