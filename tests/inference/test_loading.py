"""Loading models from checkpoints, run directories and folders, without running code in them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import BYTES, Evil, random_net, save_checkpoint

import gpt_lightning
from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.loading import read_model, start_from
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.interop.export import export
from gpt_lightning.model.gpt import build_gpt
from gpt_lightning.model.qwen3 import build_qwen3, build_starcoder2
from gpt_lightning.rundir.checkpoint import find_checkpoint, read_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a best and a last checkpoint, of different weights."""
    save_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt", random_net(seed=1))
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", random_net(seed=2))
    return tmp_path / "run"


def test_run_directory_resolves_to_its_best_or_else_last_checkpoint(run: Path) -> None:
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == find_checkpoint(best) == best
    assert find_checkpoint(last) == last
    best.unlink()
    assert find_checkpoint(run) == last
    last.unlink()
    for path in (run, run / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            find_checkpoint(path)


def test_loaded_weights_and_tokenizer_equal_the_saved_ones(run: Path) -> None:
    model = read_model(run)
    for (name, mine), (_, saved) in zip(
        model.net.named_parameters(), random_net(seed=1).named_parameters(), strict=True
    ):
        assert torch.equal(mine, saved), name
    assert tokenizers.digest(model.tokenizer) == tokenizers.digest(BYTES)
    assert not model.net.training


def test_card_has_shape_data_and_losses_but_no_path(run: Path) -> None:
    info = read_model(run).info
    assert info["parameters"] == sum(p.numel() for p in random_net().parameters())
    assert (info["name"], info["data"], info["step"], info["n_layer"]) == ("test", "tales.txt", 7, 2)
    assert (info["train_loss"], info["val_loss"], info["bits_per_byte"]) == (2.25, 2.5, 1.5)
    assert "/a/folder" not in json.dumps(info)


def test_load_from_the_package_generates(run: Path) -> None:
    model: TextGenerator = gpt_lightning.load(run, device="cpu")
    plain = TextGenerator(random_net(seed=1), BYTES)
    options = {"max_new_tokens": 30, "temperature": 0.0}
    assert model.generate("abc", **options) == plain.generate("abc", **options)
    assert not model.cuda_graph


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("build", [build_gpt, build_qwen3, build_starcoder2])
def test_bfloat16_and_int8_predictions_are_close_to_float32(tmp_path: Path, build: Any, dtype: str) -> None:
    kind = type(build(vocab_size=8, n_layer=1, n_head=1, n_embd=8).config)
    net = random_net(seed=1, kind=kind)
    path = save_checkpoint(tmp_path / "a.ckpt", net, target=f"{build.__module__}.{build.__name__}")
    try:
        small = gpt_lightning.load(path, "cpu", dtype)
    except ValueError as error:
        pytest.skip(str(error))
    idx = torch.arange(20)[None]
    with torch.no_grad():
        expected = net(idx)[..., :257].softmax(-1)
        torch.testing.assert_close(
            small.net(idx)[..., :257].float().softmax(-1), expected, atol=0.02, rtol=0.2
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device='gpu' does not exist; use auto, cpu, cuda or mps"),
        ({"device": "cuda:99"}, "device=cuda:99 is not on this machine"),
        ({"device": "meta"}, "device=meta is not on this machine"),
        ({"dtype": "float8"}, "dtype='float8' does not exist; use float32"),
    ],
)
def test_wrong_device_or_dtype_is_refused(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt_lightning.load(run, **options)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, gpt_lightning; assert 'torch' not in sys.modules; gpt_lightning.lod"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'lod'" in done.stderr


@pytest.mark.parametrize("build", [build_gpt, build_qwen3, build_starcoder2])
def test_loading_and_generating_import_no_compiler(build: Any, tmp_path: Path) -> None:
    kind = type(build(vocab_size=8, n_layer=1, n_head=1, n_embd=8).config)
    target = f"{build.__module__}.{build.__name__}"
    path = save_checkpoint(tmp_path / "a.ckpt", random_net(kind=kind), target=target)
    program = (
        "import sys, gpt_lightning\n"
        f"gpt_lightning.load({str(path)!r}).generate('a', max_new_tokens=2)\n"
        "assert not {'torch._dynamo', 'lightning', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("where", ["state_dict", "hyper_parameters", "tokenizer", "extra"])
def test_checkpoint_with_code_is_refused_without_running_it(tmp_path: Path, where: str) -> None:
    path, trap = save_checkpoint(tmp_path / "evil.ckpt", random_net()), tmp_path / "ran"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[where] = Evil(trap)
    torch.save(checkpoint, path)
    for read in (read_checkpoint, read_model, gpt_lightning.load):
        with pytest.raises(ValueError, match="holds more than tensors and plain values") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works where nobody is careful


def test_bare_pickle_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path / "good.ckpt", random_net()).read_bytes()
    for name, data in {"empty": b"", "cut": good[: len(good) // 2], "text": b"hello" * 100}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is damaged or not a checkpoint") as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    lightning = {"state_dict": {}, "hyper_parameters": {"lr": 1.0}, "tokenizer": {}}
    for foreign in ({"model": torch.zeros(2)}, torch.zeros(2), lightning):
        torch.save(foreign, tmp_path / "foreign")
        with pytest.raises(ValueError, match="not a checkpoint of gpt_lightning"):
            read_checkpoint(tmp_path / "foreign")


def test_changed_byte_in_the_weights_is_detected(tmp_path: Path) -> None:
    net = random_net()
    data = bytearray(save_checkpoint(tmp_path / "good.ckpt", net).read_bytes())
    place = data.index(net.transformer.wpe.weight.detach().numpy().tobytes())
    data[place + 3] ^= 1
    (tmp_path / "bad.ckpt").write_bytes(data)
    torch.load(tmp_path / "bad.ckpt", weights_only=True)  # torch does not mind
    with pytest.raises(ValueError, match=r"bad\.ckpt is damaged .*wrong checksum"):
        read_model(tmp_path / "bad.ckpt")


def test_model_of_another_class_is_not_built(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "own.ckpt", random_net(), target="os.mkdir")
    with pytest.raises(ValueError, match=r"model is a os\.mkdir"):
        read_model(path)


def sources(folder: Path) -> list[str]:
    """The same model as a checkpoint, as bare weights and in Hugging Face's layout."""
    model = TextGenerator(random_net(seed=1, vocab_multiple=1), BYTES)
    exported = [str(export(model, folder / name, format=name)) for name in ("weights", "huggingface")]
    return [str(save_checkpoint(folder / "source.ckpt", model.net)), *exported]


def test_start_from_applies_overrides_that_fit_the_weights(tmp_path: Path) -> None:
    idx = torch.arange(8)[None]
    expected = random_net(seed=1, vocab_multiple=1)(idx)
    for source in sources(tmp_path):
        net, _ = start_from(source, dropout=0.3, vocab_multiple=100, block_size=8, n_layer=2, n_inner=None)
        assert (net.config.dropout, net.config.padded_vocab_size, net.config.block_size) == (0.3, 300, 8)
        assert net.training
        torch.testing.assert_close(net.eval()(idx)[..., :257], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "asked", "found"),
    [("n_layer", 3, 2), ("n_head", 3, 2), ("n_embd", 32, 16), ("block_size", 64, 32), ("bias", False, True)],
)
def test_start_from_refuses_overrides_that_contradict_the_weights(
    tmp_path: Path, key: str, asked: int, found: int
) -> None:
    for source in sources(tmp_path):
        with pytest.raises(
            ValueError, match=f"^model.{key}={asked!r} but the weights in .* have {found!r}; "
        ):
            start_from(source, **{key: asked})


def test_start_from_logs_what_it_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_checkpoint(tmp_path / "checkpoints" / "best.ckpt", random_net())
    with caplog.at_level("INFO"):
        start_from(str(tmp_path))
    count = sum(p.numel() for p in random_net().parameters())
    assert caplog.messages == [
        f"init_from={path}: weights of {count:,} parameters from step 7 with validation loss 2.5000, "
        "tokenizer byte"
    ]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "odd.ckpt", random_net())
    for change, message in (
        (
            {"net.transformer.wpe.weight": torch.zeros(3, 16)},
            r"'transformer\.wpe\.weight' has shape \(3,",
        ),
        ({"net.more": torch.zeros(1)}, "has weights that the model does not, such as 'more'"),
    ):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"] |= change
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path / "changed.ckpt")
