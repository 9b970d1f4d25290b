"""Corpora: what is read, how it is split, and what a user is told when it cannot be read."""

import gzip
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt_lightning.data.corpus.base as corpus_base
import gpt_lightning.data.corpus.files as corpus_files
from gpt_lightning.data.corpus.base import BLOCK
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.huggingface import HuggingFace
from gpt_lightning.data.corpus.shakespeare import Shakespeare, download
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.token_store import prepare
from gpt_lightning.data.tokenizer import Byte

ROOT = Path(__file__).parents[2]
SHAKESPEARE = ROOT / "../shared/data/tinyshakespeare/input.txt"
STORIES = ROOT / "../shared/data/tinystories/hub"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"{SHAKESPEARE} is not here")
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path: Path, **columns: list) -> str:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def read(corpus: corpus_base.Corpus) -> tuple[list[str], list[str]]:
    return list(corpus.documents("train")), list(corpus.documents("val"))


def error_of(make: object, kind: type[Exception] | tuple = (ValueError, OSError)) -> str:
    """The message of the error that reading the corpus raises, which must be one line."""
    with pytest.raises(kind) as caught:
        read_and_digest(make())  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_and_digest(corpus: corpus_base.Corpus) -> None:
    corpus.digest()
    read(corpus)


def refusal_of(path: str) -> str:
    """What a user is told of a file, nothing if it can be read; another kind of error goes through."""
    try:
        read(TextFiles(path, val_fraction=0.5))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


# -- documents ---------------------------------------------------------------------------------------


def test_separator_ends_a_document_also_within_a_line(tmp_path):
    text = "one\ntwo\n<|endoftext|>\n  three\r\n<|endoftext|>\r\n\n<|endoftext|>\nfour<|endoftext|>five\n"
    corpus = TextFiles(write(tmp_path / "a.txt", text), val_fraction=0.25)
    assert corpus.separated
    assert read(corpus) == (["one\ntwo", "  three", "four"], ["five"])


def test_separator_across_two_blocks_is_found(tmp_path):
    first = "a" * (BLOCK - 5)
    corpus = TextFiles(write(tmp_path / "a.txt", first + "<|endoftext|>" + "b"), val_fraction=0.5)
    assert corpus.separated
    assert read(corpus) == ([first], ["b"])


def test_separator_of_ones_own_and_none(tmp_path):
    path = write(tmp_path / "a.txt", "one\n---\ntwo<|endoftext|>\n---\nthree")
    assert read(TextFiles(path, separator="---", val_fraction=0.4)) == (
        ["one", "two<|endoftext|>"],
        ["three"],
    )
    assert not TextFiles(path, separator=None).separated


def test_validation_documents_are_spread_evenly(tmp_path):
    lines = "\n".join(json.dumps({"text": str(i)}) for i in range(40))
    train, val = read(TextFiles(write(tmp_path / "a.jsonl", lines)))
    assert val == ["9", "19", "29", "39"]
    assert [int(x) for x in train] == [i for i in range(40) if i % 10 != 9]


def test_folder_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a/z.md", "az")
    write(tmp_path / "c.jsonl", '{"text": "c1"}\n\n{"text": "c2"}')
    write(tmp_path / ".git/x.txt", "hidden")
    write(tmp_path / "d.py", "not text for a corpus")
    write(tmp_path / "e.txt.gz", gzip.compress(b"e", mtime=0))
    corpus = TextFiles(str(tmp_path), val_fraction=0.2)
    assert read(corpus) == (["az", "b", "c1", "c2"], ["e"])


def test_glob_and_list_name_files_with_any_ending_and_none_twice(tmp_path):
    for name in ("x1.py", "x2.py", "y"):
        write(tmp_path / name, name)
    corpus = TextFiles(
        [str(tmp_path / "y"), str(tmp_path / "x*.py"), str(tmp_path / "x1.py")], val_fraction=0.4
    )
    assert read(corpus) == (["y", "x1.py"], ["x2.py"])


def test_jsonl_and_parquet_give_the_field_as_it_is(tmp_path):
    texts = ["  a\n", "é<|endoftext|>ü", "", "z", None]
    lines = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(texts))
    expected = (["  a\n", "é<|endoftext|>ü"], ["z"])
    for path in (
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.jsonl.gz", gzip.compress(lines.encode())),
        write_parquet(tmp_path / "a.parquet", id=list(range(5)), body=texts),
    ):
        assert read(TextFiles(path, field="body", val_fraction=0.4)) == expected


def test_val_path_is_validation_and_no_part_of_training(tmp_path):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.txt", "b<|endoftext|>c")
    val = write(tmp_path / "val.txt", "v<|endoftext|>w")
    assert read(TextFiles(str(tmp_path), val_path=val)) == (["a", "b", "c"], ["v", "w"])


def test_two_texts_with_val_path_are_taken_whole(tmp_path):
    train, val = write(tmp_path / "a.txt", "some text\n"), write(tmp_path / "b.txt", " other\n")
    corpus = TextFiles(train, val_path=val)
    assert not corpus.separated
    assert read(corpus) == (["some text\n"], [" other\n"])


def test_one_text_is_split_by_characters_with_its_line_ends(tmp_path):
    text = "\ufeff" + "aé😀\r\n" * 21  # 105 characters without the mark
    corpus = TextFiles(write(tmp_path / "a.txt", text))
    assert not corpus.separated
    assert read(corpus) == ([text[1:95]], [text[95:]])


@needs_shakespeare
def test_tiny_shakespeare_is_split_where_nanogpt_splits_it():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    train, val = read(Shakespeare(path=str(SHAKESPEARE)))
    assert ("".join(train), "".join(val)) == (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])
    assert hashlib.sha256(SHAKESPEARE.read_bytes()).hexdigest() == Shakespeare.sha256


# -- pieces of a text --------------------------------------------------------------------------------

SPACES = " \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u200b\u202f\u3000\ufeff"


WORDS = [
    "a",
    "Bc",
    "it's",
    "'",
    "7",
    "12",
    "!",
    "...",
    "é",
    "漢",
    "<|endoftext|>",
    "  ",
    " \n",
    "\n\n",
    "   ",
]


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from(WORDS + list(SPACES)), max_size=60).map("".join),
    block=st.integers(1, 9),
    size=st.integers(1, 20),
)
def test_pieces_are_tokenized_as_the_whole_text(text, block, size, encodings):
    pieces = list(corpus_files._pieces([text[i : i + block] for i in range(0, len(text), block)], size))
    assert "".join(pieces) == text
    if all(len(piece) < 8 * size for piece in pieces):  # else a cut may have been forced
        for encoding in encodings:
            assert [i for p in pieces for i in encoding.encode_ordinary(p)] == encoding.encode_ordinary(text)


@pytest.fixture(scope="module")
def encodings():
    from gpt_lightning.data.tokenizer import BPE, Byte

    learned = BPE(400).build(
        lambda split: iter(["it's a Bc Bc  \n\n é漢 ... it's 12 12 a !\n  a  a <|endoftext|>"] * 9)
    )
    return [learned, Byte().build(lambda split: iter(()))]


def test_pieces_are_about_the_size_asked_for():
    text = "some words\n" * 1000
    *pieces, _ = corpus_files._pieces([text[i : i + 64] for i in range(0, len(text), 64)], 512)
    assert len(pieces) == len(text) // 512
    assert {len(piece) for piece in pieces} <= set(range(500, 590))


def test_text_without_spaces_is_cut_before_lines_and_without_lines_anywhere():
    assert list(corpus_files._pieces(["abc\ndef\n", "ghi"], 5)) == ["abc\ndef", "\nghi"]
    assert list(corpus_files._pieces(["x" * 10] * 5, 5)) == ["x" * 40, "x" * 10]


# -- digest ------------------------------------------------------------------------------------------


def test_digest_depends_on_content_and_settings_but_not_on_the_place(tmp_path):
    a, b = "one<|endoftext|>two", "three"

    def digest(name: str, first: str = a, second: str = b, **options) -> str:
        write(tmp_path / name / "1.txt", first)
        write(tmp_path / name / "2.txt", second)
        return TextFiles(str(tmp_path / name), **options).digest()

    same = digest("here")
    assert digest("there") == same
    folder = tmp_path / "here"
    others = [
        digest("x", a + "!"),
        digest("y", b, a),
        digest("z", a + b[:1], b[1:]),  # the same bytes in a row
        digest("here", val_fraction=0.2),
        digest("here", field="body"),
        digest("here", separator="two"),
        TextFiles(str(folder / "1.txt"), val_path=str(folder / "2.txt")).digest(),
    ]
    assert len({same, *others}) == 1 + len(others)


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("a.txt", "", {}, "a.txt holds no text for the train split"),
        ("a.txt", "\n<|endoftext|>\n  \n", {}, "a.txt holds no text for the train split"),
        ("a.jsonl", "\n", {}, "a.jsonl holds no text"),
        ("a.txt", "a", {}, "holds no text for the train split"),
        ("a.txt", "a<|endoftext|>b", {}, "val_fraction=0.1 leaves none of the 2 documents"),
        ("a.txt", b"ab\xff", {}, "a.txt: byte 2 is not UTF-8; convert the file"),
        ("a.txt", b"ab\xc3", {}, "a.txt: byte 2 is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), {}, "a.txt: byte 0 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', {}, "a.jsonl: byte 24 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text"', {}, "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[" * 100_000, {}, "a.jsonl:1 is not JSON"),
        ("a.jsonl", '{"text": ' + "1" * 10_000 + "}", {}, "a.jsonl:1"),
        ("a.json", '[{"text": "a"}]', {}, "a.json:1 is a JSON list; give one object per line"),
        ("a.jsonl", '{"body": "a", "id": 3}', {}, "a.jsonl:1 has no data.field=text; it has body, id"),
        ("a.jsonl", "{}", {}, "a.jsonl:1 has no data.field=text; it has none"),
        ("a.jsonl", '{"text": 3}', {}, "a.jsonl:1: data.field=text is int, not text"),
        ("a.jsonl", '{"text": "\\ud800"}', {}, "a.jsonl:1: data.field=text has half a surrogate pair"),
        ("a.parquet", "no parquet", {}, "a.parquet is no readable parquet file"),
        ("a.txt.gz", "no gzip", {}, "a.txt.gz is no whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], {}, "a.txt.gz is no whole gzip file"),
        ("a.txt", "a", {"val_fraction": 0.0}, "data.val_fraction=0.0 must be above 0 and below 1"),
        ("a.txt", "a", {"val_fraction": 1}, "data.val_fraction=1 must be above 0"),
        ("a.txt", "a", {"val_fraction": "x"}, "data.val_fraction='x' must be above 0"),
        ("a.txt", "a", {"val_fraction": float("nan")}, "data.val_fraction=nan must be above 0"),
    ],
)
def test_bad_file_gives_one_clear_line(tmp_path, name, content, options, expected):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, content)
    assert expected in error_of(lambda: TextFiles(path, **options))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.txt", "does not exist"),
        ("missing/*.txt", "matches no file"),
        (".", "holds no file that ends in .txt"),
        (5, "data.path=5 must be a file, a glob, a folder or a list"),
        ([], "data.path=[] must be a file"),
        (["a.bin", "missing.txt"], "data.path=missing.txt does not exist"),
    ],
)
def test_path_that_means_no_file_gives_one_clear_line(tmp_path, monkeypatch, path, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.bin", "a")
    assert expected in error_of(lambda: TextFiles(path))


def test_validation_file_that_is_the_training_file_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    assert "takes all files of data.path" in error_of(lambda: TextFiles(path, val_path=path))


def test_validation_file_without_text_is_the_one_that_is_named(tmp_path):
    path, val = write(tmp_path / "a.txt", "a"), write(tmp_path / "v.txt", "")
    assert f"data.val_path={val} holds no text for the val split" in error_of(
        lambda: TextFiles(path, val_path=val)
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_offset_of_a_bad_byte_is_counted_over_blocks_and_wide_characters(tmp_path, name):
    good = ('{"text": "' + "é" * BLOCK + '"}\n').encode()
    path = write(tmp_path / name, good + b"ab\xe9")
    assert f"byte {len(good) + 2} is not UTF-8" in error_of(lambda: TextFiles(path))


def test_missing_parquet_column_lists_the_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["a"], id=[1])
    assert "has no data.field=text; it has body, id" in error_of(lambda: TextFiles(path))
    assert "data.field=id is int, not text" in error_of(lambda: TextFiles(path, field="id"))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.txt", "a.jsonl", "a.parquet", "a.txt.gz"]))
def test_random_bytes_are_read_or_refused_in_one_line(tmp_path, content, name):
    assert "\n" not in refusal_of(write(tmp_path / name, content))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["a.jsonl", "a.parquet", "a.jsonl.gz"]))
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, data, name):
    texts = ["a story", "éin anderer", "x" * 50] * 4
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, text=texts)
    else:
        lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
        write(path, gzip.compress(lines) if name.endswith("gz") else lines)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    assert "\n" not in refusal_of(write(path, bytes(content[:length])))


# -- floor -------------------------------------------------------------------------------------------


def test_floor_is_that_of_the_source_for_every_document_of_the_stories(tmp_path):
    from gpt_lightning.data.tales import Tales

    tales = Tales(seed=3, stories=30)
    corpus = TextFiles(write(tmp_path / "a.txt", tales.text()), floor=tales)
    bits = dict(tales.stories_with_bits())
    train, val = read(corpus)
    assert sorted(train + val) == sorted(bits)
    assert [corpus.floor_bits(story) for story in val] == [bits[story] for story in val]
    assert corpus.floor_bits("Not a story.") is None
    other = TextFiles(corpus.path, floor=Tales(seed=4, stories=30))
    assert len({corpus.digest(), other.digest(), TextFiles(corpus.path).digest()}) == 3


# -- downloads ---------------------------------------------------------------------------------------

CONTENT = b"To be, or not to be.\n" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A real server of one file, and the list of what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            found = self.path != "/missing"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:500] if self.path == "/cut" else CONTENT)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()
        thread.join()


def test_shakespeare_is_downloaded_once_and_again_if_damaged(tmp_path, server, caplog):
    url, asked = server
    corpus = Shakespeare(folder=str(tmp_path / "new"), url=f"{url}/input.txt", sha256=SHA256)
    assert corpus.files("train") == []  # asking for them downloads nothing
    train, val = read(corpus)
    assert ("".join(train + val)).encode() == CONTENT
    assert asked == ["/input.txt"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tinyshakespeare.txt"]
    write(tmp_path / "new/tinyshakespeare.txt", "something else")
    again = Shakespeare(folder=str(tmp_path / "new"), url=f"{url}/input.txt", sha256=SHA256)
    assert again.digest() == corpus.digest()
    assert len(asked) == 2
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("place", ["/input.txt", "/cut", "/missing"])
def test_download_that_fails_or_differs_leaves_nothing_and_says_what_to_do(tmp_path, server, place):
    url, _ = server
    sha256 = "0" * 64 if place == "/input.txt" else SHA256
    line = error_of(lambda: download(f"{url}{place}", tmp_path / "a.txt", sha256))
    assert f"{url}{place}" in line
    assert "set data.path= to the file" in line
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_server_or_a_folder_gives_one_clear_line(tmp_path, server):
    line = error_of(lambda: download("http://127.0.0.1:9/a.txt", tmp_path / "a.txt", SHA256), OSError)
    assert line.startswith("cannot download http://127.0.0.1:9/a.txt")
    file = write(tmp_path / "file", "x")
    assert "cannot download" in error_of(lambda: download(server[0], Path(file) / "a.txt", SHA256), OSError)


# -- Hugging Face ------------------------------------------------------------------------------------


@pytest.fixture
def no_datasets_cache(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@needs_stories
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_folder_gives_the_rows_of_its_parquet_files(no_datasets_cache, streaming):
    import pyarrow.parquet as parquet

    rows = [parquet.read_table(path)["text"].to_pylist() for path in sorted((STORIES / "data").iterdir())]
    corpus = HuggingFace(str(STORIES), val_split="validation", streaming=streaming)
    train, val = read(corpus)
    assert (len(train), len(val)) == (178, 20)
    assert [train, val] == rows
    part = HuggingFace(str(STORIES), streaming=streaming)
    assert part.digest() != corpus.digest()
    train, val = read(part)
    assert (len(train), len(val)) == (161, 17)
    assert val == rows[0][9::10]


@needs_stories
def test_errors_of_a_dataset_give_one_clear_line(no_datasets_cache):
    for streaming in (False, True):
        line = error_of(lambda s=streaming: HuggingFace(str(STORIES), field="story", streaming=s))
        assert "has no data.field=story; it has text" in line
        line = error_of(lambda s=streaming: HuggingFace(str(STORIES), val_split="nope", streaming=s))
        assert "nope" in line
        assert "validation" in line
    assert "'fr'" in error_of(lambda: HuggingFace(str(STORIES), config="fr"))


@pytest.mark.slow
def test_dataset_that_cannot_be_reached_gives_one_clear_line(tmp_path):
    pytest.importorskip("datasets")
    code = "from gpt_lightning.data.corpus.huggingface import HuggingFace as H\nH('nobody/nothing').digest()"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: cannot read data.name=nobody/nothing: ")
    assert "give a name on the hub that can be reached, or a local folder" in last


# -- token files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.bin": b"\1\0"}, "val.bin does not exist; data.path= must be a folder"),
        ({"train.bin": b"\1\0\2", "val.bin": b"\1\0"}, "train.bin has 3 bytes, no whole number of uint16"),
        ({"train.bin": b"\1\0", "val.bin": b""}, "val.bin has 0 bytes"),
        ({"train.bin": b"\1\0", "val.bin": b"\1\0"}, "holds token ids, not text"),
    ],
)
def test_bad_folder_of_token_files_gives_one_clear_line(tmp_path, files, expected):
    for name, content in files.items():
        write(tmp_path / name, content)
    assert expected in error_of(lambda: TokenBins(str(tmp_path)))


class Unnamed:
    """A source of the user's own without a repr."""

    def bits(self, document: str) -> float | None:
        return None


class Shifting:
    """A corpus of the user's own whose digest has an address in memory."""

    separated = True

    def digest(self) -> str:
        return f"digits of {self!r}"

    def documents(self, split: str) -> Iterator[str]:
        return iter(["one", "two"])

    def floor_bits(self, document: str) -> float | None:
        return None


def test_digest_that_would_change_at_each_start_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some text\n" * 20)
    with pytest.raises(ValueError, match=r"the floor of data\.corpus is .* give the class a __repr__"):
        TextFiles(str(path), floor=Unnamed()).digest()
    with pytest.raises(ValueError, match=r"the digest of data\.corpus is .* tokenized again every time"):
        prepare(Shifting(), Byte(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
