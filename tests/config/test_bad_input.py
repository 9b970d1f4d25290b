# ruff: noqa: E501 (a row of the table is a line)
"""Wrong uses: each ends in one line that names what is wrong, with exit code 1, and nothing half-written."""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from support.runs import TINY

from gpt_lightning.config.errors import one_line
from gpt_lightning.config.parts import build_parts, build_trainer
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.config.rules import validate

pytestmark = pytest.mark.slow  # a third of a second each, most of it Hydra's

# command, its arguments, what the line says (a regular expression). In the arguments, a name of a file below
# stands for that file. `train` and `plan` run on a good configuration in which one thing is wrong.
TABLE: list[tuple[str, str, str]] = [
    # -- keys that do not exist, and what Hydra refuses
    ("train", "model.nlayer=3", r"there is no key model.nlayer; did you mean model.n_layer\?"),
    ("train", "sed=3", r"there is no key sed; did you mean seed\?"),
    ("train", "lr=3", r"there is no key lr; did you mean optimizer.lr\?"),
    ("train", "max_steps=3", r"there is no key max_steps; did you mean trainer.max_steps\?"),
    ("train", "learning_rate=3", r"there is no key learning_rate; did you mean optimizer.lr\?"),
    ("train", "optimizer.learning_rate=3", r"there is no key optimizer.learning_rate; did you mean optimizer.lr\?"),
    ("train", "optimizer=muon optimizer.muonlr=1", r"there is no key optimizer.muonlr; did you mean optimizer.muon_lr\?"),
    ("train", "model=modern_tiny model.bias=true", "there is no key model.bias; --cfg job shows all keys"),
    ("train", "model=gpt3", r"^error: model=gpt3 is no choice; did you mean gpt\? there are baby, gpt, .*, tiny$"),
    ("train", "experiment=mine", "experiment=mine is no choice; there are bpe_from_scratch, .*tinystories_124m$"),
    ("train", "logger=null", "logger=null is no choice; use default, mlflow, none"),
    ("train", "tokenizer=[1]", r"tokenizer=\[1\] is no choice; use bpe, byte"),
    ("train", "seed", "Error parsing override 'seed' missing EQUAL"),
    ("train", "data.path=[a", "no viable alternative at input"),
    ("train", "tokenizer._target_=json", "tokenizer._target_=json is no class"),
    ("train", "data.corpus=3", "data.corpus=3 must be keys with values, of which _target_ names a class"),
    ("train", "~optimizer.lr", "optimizer cannot be made of its values: .* missing 1 required .*: 'lr'"),
    ("train", "+model.n_experts=8", "model.n_experts is no argument of StarCoder2Config; it takes vocab_size, block_size"),
    ("train", "+trainer.lightning.max_time=00:00:01:00", "trainer.lightning.max_time=.* set time_limit instead"),
    ("train", "trainer.lightning=[1]", "trainer.lightning=.*--cfg job shows what belongs there"),
    # -- types and ranges; KEYS has the others
    ("train", "seed=-1", "seed=-1 must be a whole number from 0 to"),
    ("train", "tokenizer=char callbacks.samples.prompt=Ж", "callbacks.samples.prompt='Ж': tokenizer=char has no token"),
    ("train", "++trainer.maxsteps=9", "there is no key trainer.maxsteps; did you mean trainer.max_steps?"),
    ("plan", "+device.bogus=1", "there is no key device.bogus; --cfg job shows all keys"),
    ("train", "optimizer._target_=plugin.Mine", "_target_=plugin.Mine, or start where that module is, or name"),
    ("train", "optimizer._target_=.x", "correct optimizer._target_=.x"),
    ("train", "+logger.mine._target_=os.getcwd", "logger.mine is a str, which has no log_metrics; correct its _target_"),
    ("train", "optimizer.lr=fast", "optimizer.lr='fast' must be a number"),
    ("train", "name=../elsewhere", "name='../elsewhere' names a folder"),
    ("train", "data.val_fraction=2", "data.val_fraction=2 must be above 0 and below 1"),
    ("train", "data.separator=3", "data.separator=3 must be text or null; quote it, as in data.separator=\"'3'\""),
    ("train", "data.field=3", "data.field=3 must be text"),
    ("train", "data.val_fraction=half", "data.val_fraction='half' must be a number"),
    ("prepare", "data=huggingface data.name=3", "data.name=3 must be text"),
    ("prepare", "data=huggingface data.name=x data.streaming=no", "data.streaming='no' must be true or false"),
    ("train", "data=shakespeare paths.data=3 data.path=null", "paths.data=3 must be text"),
    ("train", "data=bin data.path=[a,b]", r"data.path=\['a', 'b'\] must be text"),
    ("train", "paths.cache=3", "paths.cache=3 must be the name of a folder"),
    ("train", "tokenizer=bpe tokenizer.vocab_size=100", "tokenizer.vocab_size=100 must be .* from 257"),
    ("train", "tokenizer=bpe tokenizer.vocab_size=many", "tokenizer.vocab_size='many' must be a whole number"),
    ("train", "scheduler=wsd scheduler.decay_ratio=3", "scheduler.decay_ratio=3 is a share"),
    ("train", "callbacks=diagnostics callbacks.diagnostics.every_steps=0", "callbacks.diagnostics.every_steps=0 must be at least 1"),
    ("train", "callbacks=diagnostics device=cpu device.compile=true", "sees no layers of a compiled network; use device.compile=false"),
    ("train", "callbacks=early_stopping callbacks.early_stopping.patience=x", "patience='x' must be a whole number"),
    ("train", "init_from=run lora.r=2 lora.lora_alpha=0", "lora.lora_alpha=0 must be a number above 0"),
    ("train", "init_from=run lora.r=2 lora.target_modules=all", "lora.target_modules='all' must be a list"),
    ("train", "data.path=nowhere.txt data.sequence_length=64", "data.sequence_length=64"),
    # -- combinations
    ("train", "model.vocab_size=10", "model.vocab_size=10 is smaller than the tokenizer's 257 ids"),
    ("train", "trainer.max_steps=null trainer.max_epochs=1 scheduler.warmup_steps=999", "scheduler.warmup_steps=999"),
    ("train", "data.batch_size=5000", "windows of 32 tokens, fewer than data.batch_size=5000"),
    ("train", "model.block_size=100000", "fewer than one window of 100000"),
    ("train", "resume=run repeat=run", "resume= and repeat= exclude each other"),
    ("train", "data.path=", "data.path= is empty, as an unset variable is"),
    ("train", "resume=run init_from=run", "resume=.* and init_from=.* exclude each other"),
    ("train", "model.n_embd=100000000", "out of memory .* use a smaller model"),
    # -- text
    ("train", "data.path=nowhere.txt", "nowhere.txt does not exist"),
    ("train", "data.path=null", "data.path=None must be text or a list"),
    ("train", "data.path=empty.txt", "empty.txt holds no text"),
    ("train", "data.path=latin.txt", "latin.txt: byte 3 is not UTF-8"),
    ("train", "data.path=short.txt", "the training split has 4 tokens"),
    ("train", "data.val_path=letter.txt", "the val split has 1 tokens; two are the least .* use more text"),
    ("train", "data.path=broken.jsonl", "broken.jsonl:2 is not JSON"),
    ("train", "data.path=other.jsonl", "other.jsonl:1 has no data.field=text; it has body"),
    ("train", "data.path=broken.parquet", "broken.parquet is no readable parquet file"),
    ("train", "data.path=~nosuchuser/x", "data.path=~nosuchuser/x: ~nosuchuser is the home of no user here"),
    ("train", "data.path=['~nosuchuser/x']", "~nosuchuser is the home of no user here"),
    ("train", "resume=~nosuchuser/x", "resume=~nosuchuser/x: ~nosuchuser is the home of no user here"),
    ("train", "hydra.run.dir=~nosuchuser/x", "hydra.run.dir=~nosuchuser/x: ~nosuchuser is the home of no user here"),
    ("generate", "checkpoint=~nosuchuser/x", "checkpoint=~nosuchuser/x: ~nosuchuser is the home of no user here"),
    ("train", "data.path=fifo", "fifo is neither a file nor a folder"),
    ("train", "data.path=/dev/zero", "/dev/zero is neither a file nor a folder"),
    ("train", "data.path=folder", "folder holds no file that ends in .txt"),
    ("train", "data.val_path=nowhere.txt", "data.val_path=.*nowhere.txt does not exist"),
    ("prepare", "data=text", "data.path= must be given"),
    ("prepare", "data=bin data.path=bins tokenizer=byte", "train.bin has 3 bytes, no whole number"),
    ("prepare", "data=chat data.path=good.txt", "good.txt: data=chat reads .jsonl files, a conversation per line"),
    ("prepare", "data=text data.path=good.txt shard=1", "shard=1 and shards=None go together"),
    ("prepare", "data=text data.path=good.txt verify=x", "verify='x' must be true or false"),
    ("prepare", "data=text data.path=good.txt shard=5 shards=2", "shard=5 must be a whole number from 0 to 1, since shards=2"),
    ("prepare", "-m data=text data.path=good.txt shard=0,1 shards=2 sweep.jobs=0", "sweep.jobs=0 must be a whole number"),
    ("evaluate", "-m checkpoint=run,run hydra/launcher=processes", "starts jobs of train and prepare, not of evaluate"),
    ("prepare", "data=text data.path=good.txt shard=a shards=2", "shard='a' must be a whole number"),
    ("prepare", "data=text data.path=good.txt paths.cache=", "paths.cache='' must be the name of a folder"),
    ("prepare", "data=text data.path=good.txt shard=0 shards=0", "shards=0 must be a whole number from 1 to 512"),
    ("plan", "scheduler.warmup_steps=8", "scheduler.warmup_steps=8 must be"),
    ("plan", "optimizer.lr=-1", "optimizer.lr=-1 must be a finite number above 0"),
    ("plan", "check=maybe", "check='maybe' must be true or false"),
    ("train", "data.shuffle_buffer=0", "data.shuffle_buffer=0 must be a whole number of at least 1 or null"),
    ("train", "data.shuffle_buffer=8 trainer.val_batches=null", "data.shuffle_buffer trains before the whole"),
    ("train", "data.shuffle_buffer=8 trainer.val_batches=2 trainer.max_epochs=1", "data.shuffle_buffer trains"),
    ("plan", "device=cuda gpu=rtx", "gpu='rtx' must be a100, h100, h200, or dense TFLOP/s in bfloat16"),
    ("plan", "device=cuda gpu=-3", "gpu=-3 must be a100"),
    ("plan", "gpu=h100", "gpu=h100 needs device=cuda"),
    ("plan", "model.n_head=3", "model.n_head=3 does not divide model.n_embd=32; choose model.n_embd=30"),
    # -- checkpoints and runs
    ("train", "init_from=fifo", "no checkpoint at .*fifo: it is neither a file nor a folder"),
    ("train", "init_from=nowhere", "no checkpoint at .*nowhere: it does not exist"),
    ("train", "init_from=folder", "no checkpoint at .*folder: it has no checkpoints/best.ckpt"),
    ("train", "init_from=noise.ckpt", "noise.ckpt is damaged or not a checkpoint"),
    ("train", "init_from=other.ckpt", "other.ckpt is not a checkpoint of gpt_lightning"),
    ("train", "init_from=code.ckpt", "code.ckpt holds more than tensors and plain values"),
    ("train", "init_from=cut.ckpt", "cut.ckpt is damaged or not a checkpoint"),
    ("train", "init_from=run model.n_layer=3", "model.n_layer=3 but the weights in .*run.* have 2; leave the key out"),
    ("train", "init_from=run model=starcoder2", "model.rope_theta=.* but the weights in .*run.* have 500.0; leave model=starcoder2 out"),
    ("train", "init_from=run model=gpt2_medium", "model.bias is no option of the weights in .*run.*; leave model=gpt2_medium out"),
    ("train", "init_from=run experiment=gpt2_124m", "model.bias is no option of the weights in .*run.*; leave experiment=gpt2_124m out"),
    ("train", "resume=nowhere", "nowhere is not a run directory"),
    ("train", "repeat=nowhere", "nowhere is not a run directory"),
    ("train", "repeat=run hydra.run.dir=run", "run holds a run; go on with resume="),
    ("train", "resume=good.txt", "good.txt is not a run directory"),
    ("train", "resume=latest paths.outputs=folder", "resume=latest: there is no run below .*folder"),
    ("train", "resume=run seed=2", r"these would change it: seed \(was 1337, now 2\)"),
    ("train", "resume=run -m", "resume= continues one run"),
    ("train", "resume=run hydra.run.dir=folder", "resume=.* goes on in .*run; leave out hydra.run.dir="),
    ("train", "resume=linked", r"linked/samples.md is a link out of the run directory; put"),
    ("train", "resume=unfinished", "every checkpoint of the run is damaged: .*last.ckpt"),
    ("generate", "", "checkpoint= is missing"),
    ("generate", "checkpoint=", "checkpoint= is missing"),
    ("generate", "checkpoint=no/where=1,2", "no checkpoint at no/where=1,2: it does not exist"),
    ("generate", "checkpoint=mine/latest paths.outputs=folder", "there is no run with a checkpoint below .*folder/mine"),
    ("generate", "checkpoint=latest paths.outputs=null", "paths.outputs=None must be text"),
    ("generate", "checkpoint=run prompt=a model=tiny", "has no model of your own, but a .*build_starcoder2; leave model= out"),
    ("generate", "checkpoint=run prompt_file=fifo", "prompt_file=.*fifo is neither a file nor a folder"),
    ("generate", "checkpoint=run prompt_file=/dev/zero", "prompt_file=/dev/zero is neither a file nor a folder"),
    ("generate", "checkpoint=run prompt=a num_samples=1000000000", "num_samples=1000000000 must be a whole number from 1 to"),
    ("generate", "checkpoint=run temperature=1e-45", "temperature=1e-45 must be a number from 1e-20"),
    ("generate", "checkpoint=run top_p=1e-300", "top_p=1e-300 must be a number from 1e-20"),
    ("generate", "checkpoint=run repetition_penalty=1e-308", "repetition_penalty=1e-308 must be a number from 0.01"),
    ("generate", "checkpoint=cut.ckpt", "cut.ckpt is damaged"),
    ("generate", "checkpoint=run temperature=-1", "temperature=-1 must be a number from 1e-20"),
    ("generate", "checkpoint=run top_p=2", "top_p=2 must be"),
    ("generate", "checkpoint=run top_k=0", "top_k=0 must be a whole number of at least 1, or null"),
    ("generate", "checkpoint=run min_p=x", "min_p='x' must be a number from"),
    ("generate", "checkpoint=run repetition_penalty=0", "repetition_penalty=0 must be a number from 0.01"),
    ("generate", "checkpoint=run num_samples=0", "num_samples=0 must be a whole number from 1"),
    ("generate", "checkpoint=run seed=-1", "seed=-1 must be a whole number from 0"),
    ("generate", "checkpoint=run stop=", "stop='' must be a text of at least one character, a list, or null"),
    ("generate", "checkpoint=run interactive=x", "interactive='x' must be true or false"),
    ("generate", "checkpoint=run interactive=true prompt=a", "interactive=true asks for prompts; leave prompt= out"),
    ("generate", "checkpoint=run device.accelerator=tpu", "device='tpu' does not exist; use auto, cpu"),
    ("generate", "checkpoint=run prompt_file=empty.txt", "empty.txt is empty; write one prompt a line"),
    ("generate", "checkpoint=run prompt_file=nowhere.txt", "prompt_file=.*nowhere.txt does not exist"),
    ("generate", "checkpoint=run default_prompts=Once", "default_prompts='Once' must be a list of texts, such as"),
    ("generate", "checkpoint=run default_prompts=[1]", r"default_prompts=\[1\] must be a list of texts"),
    ("generate", "checkpoint=run temprature=1", "there is no key temprature; did you mean temperature"),
    ("generate", "checkpoint=run max_new_tokens=0", "max_new_tokens=0 must be"),
    ("generate", "checkpoint=run dtype=int3", "dtype='int3' does not exist; use float32"),
    ("generate", "checkpoint=run prompt=a prompt_file=good.txt", "prompt= and prompt_file= exclude each other"),
    ("generate", "checkpoint=run prompt_file=latin.txt", "latin.txt is not UTF-8"),
    ("evaluate", "checkpoint=run text=nowhere.txt", "nowhere.txt does not exist"),
    ("evaluate", "checkpoint=run text=short.txt stride=99", "stride=99 must be a whole number from 1 to .*32"),
    ("evaluate", "", "checkpoint= is missing"),
    ("evaluate", "checkpoint=run text=good.txt split=test", "split='test' must be train or val"),
    ("evaluate", "checkpoint=run text=good.txt batch_size=0", "batch_size=0 must be a whole number of at least 1"),
    ("evaluate", "checkpoint=run text=good.txt data=input_txt", "text=.* and data= exclude each other"),
    ("evaluate", "checkpoint=run text=short.txt stride=true", "stride=True must be a whole number of at least 1 or null"),
    ("evaluate", "checkpoint=run reference=good.txt samples=nowhere.txt", "samples=.*nowhere.txt does not exist"),
    ("evaluate", "checkpoint=run reference=good.txt samples=broken.jsonl", "broken.jsonl has a line without a text .* use what generate"),
    ("evaluate", "checkpoint=run text=fifo", "text=.*fifo is neither a file nor a folder"),
    ("evaluate", "checkpoint=run text=", "text= is neither a file nor a folder"),
    ("evaluate", "checkpoint=run reference=good.txt samples=fifo", "samples=.*fifo is neither a file nor a folder"),
    ("evaluate", "checkpoint=run reference=good.txt samples=/dev/zero", "samples=/dev/zero is neither a file nor a folder"),
    ("evaluate", "checkpoint=run reference=good.txt samples=null.jsonl", "null.jsonl has a line without a text .*NoneType"),
    ("evaluate", "checkpoint=run reference=good.txt samples=numbers.jsonl", "numbers.jsonl has a line without a text .*int"),
    ("evaluate", "checkpoint=run reference=good.txt samples=deep.jsonl", "deep.jsonl has a line without a text .*recursion"),
    ("evaluate", "checkpoint=run reference=good.txt samples=latin.txt", "latin.txt is not UTF-8 text"),
    ("evaluate", "checkpoint=run reference=good.txt", "samples=FILE and reference=FILE, texts and what they should be, go together"),
    ("evaluate", "checkpoint=run samples=short.txt reference=good.txt", "has 900 texts for the 1 of samples="),
    ("evaluate", "checkpoint=run text=good.txt tokens=1", "tokens=1 must be true or false"),
    ("evaluate", "checkpoint=run text=good.txt tokens=true", "tokens=true writes a page, but output=None; name a file that ends in .html"),
    ("evaluate", "checkpoint=run samples=good.txt reference=good.txt tokens=true output=p.html", "tokens=true shows a text; give text= or data="),
    ("evaluate", "checkpoint=run text=short.txt tokens=true output=p.html layer=-1", "layer=-1 must be a whole number of at least 0"),
    ("evaluate", "checkpoint=run text=short.txt tokens=true output=p.html head=2", "head=2 must be a whole number from 0 to 1"),
    ("evaluate", "checkpoint=run text=good.txt output=fifo", "output=.*fifo holds what this command did not write"),
    ("evaluate", "checkpoint=run text=good.txt output=folder", "output=.*folder is a folder; name a file in it"),
    ("evaluate", "checkpoint=run text=good.txt output=good.txt/x", "good.txt: Not a directory; name a place below"),
    ("export", "checkpoint=run output=new overwrite=x", "overwrite='x' must be true or false"),
    ("export", "checkpoint=nowhere output=new", "no checkpoint at .*nowhere: it does not exist"),
    ("export", "checkpoint=run output=good.txt", "good.txt is a file; give the name of a folder"),
    ("export", "checkpoint=run output=good.txt/in", "good.txt"),
    ("export", "checkpoint=run", "output= is missing"),
    ("export", "checkpoint=run output=new format=onnx", "format='onnx' does not exist; use huggingface"),
    ("export", "checkpoint=run output=bins", "bins is a folder with other files"),
    ("report", "runs=run fit=power", "fit='power' must be scaling or null"),
    ("report", "", "runs= is missing"),
    ("report", "runs=nowhere", "there is no run in"),
    ("report", "runs=run output=x.pdf", "output=x.pdf must end in .csv, .md, .html"),
    ("report", "runs=run watch=3", "watch=3 must be true or false"),
    ("report", "runs=run fit=scaling budget=-1", "budget=-1 must be a number above 0 or null"),
    ("report", "runs=run budget=1e9", "budget=.* belongs to fit=scaling; add it"),
    ("report", "runs=run tensorboard=70000", "tensorboard=70000 must be a whole number from 0 to 65535 or null"),
    ("report", "runs=run tensorboard=0 watch=true", "watch= and tensorboard= exclude each other; leave one out"),
    ("report", "runs=run fit=scaling watch=true", "fit=scaling and watch=true exclude each other"),
    ("demo", "checkpoint=run port=99999", "port=99999 must be a whole number from 0 to 65535"),
    ("demo", "port=0", "checkpoint= is missing"),
    ("demo", "checkpoint=run port=x", "port='x' must be a whole number from 0 to 65535"),
    ("demo", "checkpoint=run host=1.2.3.4 port=0", "host=1.2.3.4 port=0: Cannot assign .*; choose another port or host"),
    ("demo", "checkpoint=run host=no.such.host.invalid port=0", "host=no.such.host.invalid port=0: "),
    ("demo", "checkpoint=run port=0 host=0.0.0.0", "host=0.0.0.0 lets other machines in; set a key .* GPT_LIGHTNING_API_KEY"),
    ("demo", "checkpoint=run port=0 api_key=", "api_key='' must be text"),
    ("demo", "checkpoint=run port=0 host=3", "host=3 must be text"),
    ("demo", "checkpoint=run port=0 allowed_hosts=me", "allowed_hosts='me' must be a list of texts"),
    ("demo", "checkpoint=run port=0 queue=-1", "queue=-1 must be a whole number of at least 0"),
    ("demo", "checkpoint=run port=0 max_prompt_chars=0", "max_prompt_chars=0 must be a whole number of at least 1"),
    # -- the machine
    ("train", "paths.cache=good.txt", "cannot write to the token cache .*good.txt"),
    ("train", "hydra.run.dir=good.txt/run", "good.txt/run: Not a directory; name a place below a folder"),
]  # fmt: skip


# wrong values of keys of `train`, and what is said of them before anything is read; here without a command line
KEYS: list[tuple[str, str]] = [
    ("model._target_=torch.nn.Foo", "model: Error loading 'torch.nn.Foo'"),
    ("optimizer._target_=3", "optimizer._target_=3 must be the name of a class"),
    ("optimizer._target_=torch.optim.SGD", "optimizer.muon_lr is no argument of SGD; it takes params, lr"),
    ("optimizer._partial_=false", "optimizer cannot be made of its values: .* missing 1 required"),
    ("scheduler._partial_=x", "scheduler cannot be made of its values: .* must be a bool"),
    ("+optimizer.rho=0.9", "optimizer.rho is no argument of muon; it takes params, lr, muon_lr"),
    ("+scheduler.power=2", "scheduler.power is no argument of cosine; it takes step, max_steps"),
    ("+callbacks.mine._target_=builtins.dict", "callbacks.mine is a dict, which has no on_train_start; correct its _target_"),
    ("+callbacks.mine=3", "callbacks.mine=3 must be keys with values, of which _target_ names a class"),
    ("+trainer.lightning.foo=1", "trainer.lightning.foo is no argument of Trainer; it takes fast_dev_run"),
    ("+trainer.lightning.max_steps=1", "trainer.lightning.max_steps=1 would be ignored; set trainer.max_steps instead"),
    ("+trainer.lightning.accumulate_grad_batches=4", "would be ignored; set data.batch_size and device.micro_batch_size"),
    ("+trainer.lightning.val_check_interval=4", "would be ignored; set trainer.val_every_steps instead"),
    ("+trainer.lightning.gradient_clip_val=1", "would be ignored; set trainer.clip_norm instead"),
    ("+trainer.lightning.overfit_batches=x", "trainer.lightning.overfit_batches='x' must be a number"),
    ("paths.run=3", "paths.run=3 must be text; quote a number"),
    ("trainer.max_steps=null", "trainer.max_steps, trainer.max_epochs, trainer.tokens_per_parameter, .* are all null"),
    ("trainer.tokens_per_parameter=0", "trainer.tokens_per_parameter=0 must be a number above 0 or null"),
    ("trainer.max_flops=many", "trainer.max_flops='many' must be a number above 0 or null"),
    ("scheduler.warmup_steps=8", "scheduler.warmup_steps=8 .* smaller than the run's 8 optimizer steps"),
    ("lora.r=2", "lora.r=2 trains beside frozen weights; give these with init_from="),
    ("data.batch_size=7 device.devices=2", "data.batch_size=7 cannot be shared by 2 devices"),
    ("device.precision=16-mixed", "device.precision=16-mixed needs a CUDA GPU"),
    ("time_limit=1:00:00 callbacks.last=null", "time_limit= needs the checkpoints of callbacks.last"),
    ("seed=4294967296", "seed=4294967296 must be a whole number from 0 to 4294967295"),
    ("seed=abc", "seed='abc' must be a whole number"),
    ("name=null", "name=None names a folder"),
    ("paths.outputs=null", "paths.outputs=None must be text"),
    ("target_loss=0", "target_loss=0 must be a number above 0 or null"),
    ("time_limit=1:99:00", "time_limit='1:99:00' must be HH:MM:SS"),
    ("time_limit=soon", "time_limit='soon' must be HH:MM:SS"),
    ("data.batch_size=0", "data.batch_size=0 must be a whole number of at least 1"),
    ("data.batch_size=2.5", "data.batch_size=2.5 must be a whole number"),
    ("data.stride=0", "data.stride=0 must be a whole number of at least 1 or null"),
    ("data.sequence_length=0", "data.sequence_length=0 must be"),
    ("data.num_workers=-1", "data.num_workers=-1 must be a whole number from 0 to 1000"),
    ("data.num_workers=1000000000", "data.num_workers=1000000000 must be a whole number from 0 to 1000"),
    ("data.shuffle=maybe", "data.shuffle='maybe' must be true or false"),
    ("data.drop_last=7", "data.drop_last=7 must be true or false"),
    ("data.random_offset=1", "data.random_offset=1 must be true or false"),
    ("model.n_layer=1000000000", "model.n_layer=1000000000 must be a whole number from 1 to 10000"),
    ("model.n_embd=1000000000000000000000000000000", "model.n_embd=.* must be .* at most 1000000000000"),
    ("device.devices=1000000000000000000000000000000", "device.devices=1000000000000000000000000000000 must be"),
    ("model.n_layer=0", "model.n_layer=0 must be a whole number from 1"),
    ("model.n_layer=1.5", "model.n_layer=1.5 must be a whole number"),
    ("model.n_head=5", "model.n_head=5 does not divide model.n_embd=32; choose model.n_embd=30"),
    ("model.dropout=1", r"model.dropout=1 must lie in \[0, 1\)"),
    ("model.tie_weights=x", "model.tie_weights='x' must be true or false"),
    ("model.vocab_size=x", "model.vocab_size='x' must be a whole number"),
    ("optimizer.lr=0", "optimizer.lr=0 must be a finite number above 0"),
    ("optimizer.lr=fast", "optimizer.lr='fast' must be a number"),
    ("optimizer.lr=null", "optimizer.lr=None must be a number"),
    ("optimizer.lr=inf", "optimizer.lr=inf must be a finite number above 0"),
    ("optimizer.betas=[0.9]", r"optimizer.betas=\[0.9\] must be two numbers"),
    ("optimizer.betas=[0.9,x]", r"optimizer.betas=\[0.9, 'x'\] must be two numbers"),
    ("optimizer.betas=3", "optimizer.betas=3 must be a list"),
    ("optimizer.eps=-1", "optimizer.eps=-1 must be a finite number of at least 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1 must be a finite number of at least 0"),
    ("optimizer.fused=x", "optimizer.fused='x' must be true or false or null"),
    ("scheduler.warmup_steps=-1", "scheduler.warmup_steps=-1 must be"),
    ("scheduler.warmup_steps=1.5", "scheduler.warmup_steps=1.5 must be a whole number"),
    ("scheduler.max_steps=0", "scheduler.max_steps=0 must be at least 1 optimizer step"),
    ("scheduler.warmup_start_ratio=-1", "scheduler.warmup_start_ratio=-1 is a share"),
    ("scheduler.min_lr_ratio=2", r"scheduler.min_lr_ratio=2 is a share, so it must lie in \[0, 1\]"),
    ("device.accelerator=gpux", "device.accelerator='gpux' must be auto, cpu, cuda or mps"),
    ("device.devices=0", "device.devices=0 must be how many, auto for all, or a list"),
    ("device.devices=[0]", r"device.devices=\[0\] names GPUs; on a CPU it is a number"),
    ("device.devices=two", "device.devices='two' must be how many"),
    ("device.compile=yes", "device.compile='yes' must be true or false"),
    ("device.precision=8", "device.precision=8 must be auto, 32-true, bf16-mixed, 16-mixed"),
    ("device.micro_batch_size=x", "device.micro_batch_size='x' must be a whole number of at least 1 or null"),
    ("device.matmul_precision=low", "device.matmul_precision='low' must be highest, high or medium"),
    ("trainer.max_steps=many", "trainer.max_steps='many' must be a whole number"),
    ("trainer.max_epochs=1000000000000000000000000000000", "trainer.max_epochs=1000000000000000000000000000000 must be .*, and at most 1000000000000"),
    ("trainer.max_steps=1000000000000000000000000000000", "trainer.max_steps=1000000000000000000000000000000 must be .* at most"),
    ("trainer.max_epochs=0.5", "trainer.max_epochs=0.5 must be a whole number of at least 1 or null"),
    ("trainer.val_batches=0", "trainer.val_batches=0 must be"),
    ("trainer.log_every_steps=0", "trainer.log_every_steps=0 must be"),
    ("trainer.save_every_steps=0", "trainer.save_every_steps=0 must be"),
    ("trainer.snapshot_every_steps=0", "trainer.snapshot_every_steps=0 must be"),
    ("trainer.num_nodes=0", "trainer.num_nodes=0 must be"),
    ("trainer.max_steps=0", "trainer.max_steps=0 must be a whole number of at least 1 or null"),
    ("trainer.val_every_steps=0", "trainer.val_every_steps=0 must be"),
    ("trainer.keep_last=0", "trainer.keep_last=0 must be"),
    ("trainer.keep_last=1000000000", "trainer.keep_last=1000000000 must be a whole number from 1 to 1000"),
    ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn cannot hand a run to the processes that it starts; use ddp"),
    ("trainer.strategy=fsdp_cpu_offload", "trainer.strategy=fsdp_cpu_offload is another FSDP; use trainer=fsdp"),
    ("trainer.strategy={_target_:lightning.pytorch.strategies.FSDPStrategy}", "FSDPStrategy.* is another FSDP; use trainer=fsdp"),
    ("trainer.strategy=fsdp init_from=run lora.r=2", "trainer.strategy=fsdp does not train adapters; use lora.r=0 or trainer=ddp"),
    ("trainer.activation_checkpointing=x", "trainer.activation_checkpointing='x' must be true or false"),
    ("trainer.timeout_seconds=0", "trainer.timeout_seconds=0 must be a whole number from 1 to 86400"),
    ("trainer.clip_norm=-1", "trainer.clip_norm=-1 must be a number above 0 or null"),
    ("trainer.strategy=fast", "invalid strategy name: `strategy='fast'`"),
    ("trainer.strategy=3", "trainer.strategy=3 must be keys with values, of which _target_ names a class"),
    ("trainer.deterministic=x", "trainer.deterministic='x' must be true, false or warn"),
    ("trainer.lightning=3", "trainer.lightning=3 must be keys with values"),
    ("callbacks.nonfinite=ignore", "callbacks.nonfinite='ignore' must be stop or skip"),
    ("callbacks.incidents.spike=1", "callbacks.incidents.spike=1 is a multiple, so it must exceed 1"),
    ("callbacks.best.monitor=loss", "callbacks.best.monitor='loss' must be one of val/loss"),
    ("callbacks.nonfinite=3", "callbacks.nonfinite=3 must be stop or skip"),
    ("callbacks.incidents.spike=inf", "callbacks.incidents.spike=inf .* null reports none"),
    ("callbacks.samples.top_k=0", "callbacks.samples.top_k=0 must be a whole number of at least 1"),
    ("callbacks.samples=false", "callbacks.samples=False must be keys with values, .* _target_ names a class"),
    ("callbacks.samples.temperature=-1", "callbacks.samples.temperature=-1 must be a number from 1e-20"),
    ("callbacks.samples.prompt=3", "callbacks.samples.prompt=3 must be text"),
    ("callbacks.best.filename=3", "callbacks.best.filename=3 must be text or null"),
    ("callbacks.best.mode=least", "callbacks.best.mode='least'|`mode` can be min, max but got least"),
    ("logger.tensorboard=3", "logger.tensorboard=3 must be keys with values"),
    ("logger.tensorboard.default_hp_metric=x", "logger.tensorboard.default_hp_metric='x' must be true or false"),
    ("lora.r=-1", "lora.r=-1 must be a whole number of at least 0"),
]  # fmt: skip


class Code:
    """Would run when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this must not be printed",))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good text, and with what is wrong with files."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("folder", "bins"):
        (folder / name).mkdir()
    (folder / "good.txt").write_text("the cat sees a dog.\n" * 900)
    (folder / "empty.txt").write_text("")
    os.mkfifo(folder / "fifo")
    (folder / "null.jsonl").write_text('{"text": null}\n')
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "short.txt").write_text("hello")
    (folder / "letter.txt").write_text("a")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"txt": 3\n')
    (folder / "other.jsonl").write_text('{"body": "a"}\n' * 10)
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    for split in ("train", "val"):
        (folder / "bins" / f"{split}.bin").write_bytes(b"123")
    (folder / "noise.ckpt").write_bytes(random.Random(3).randbytes(5000))
    torch.save({"a": 1}, folder / "other.ckpt")
    torch.save({"state_dict": Code()}, folder / "code.ckpt")
    return folder


@pytest.fixture(scope="module")
def options(files: Path) -> list[str]:
    """A configuration in which nothing is wrong."""
    return [*TINY, f"data.path={files / 'good.txt'}", "logger=none", "callbacks.layers=null"]


@pytest.fixture(scope="module")
def places(files: Path, options: list[str]) -> set[str]:
    """Names in `files` that arguments may have; makes a run there."""
    from gpt_lightning import train

    before = sys.argv
    sys.argv = ["train", *options, f"hydra.run.dir={files / 'run'}", "trainer.max_steps=2"]
    sys.argv += ["scheduler.warmup_steps=0", "trainer.val_every_steps=2"]
    train.main()
    sys.argv = before
    run, unfinished = files / "run", files / "unfinished"
    (files / "cut.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:9000])
    (unfinished / "checkpoints").mkdir(parents=True)
    for path in (run / ".hydra").iterdir():
        (unfinished / ".hydra").mkdir(exist_ok=True)
        (unfinished / ".hydra" / path.name).write_bytes(path.read_bytes())
    (unfinished / "checkpoints" / "last.ckpt").write_bytes(b"nothing")
    shutil.copytree(unfinished, files / "linked")
    (files / "linked" / "samples.md").symlink_to(files / "good.txt")
    return {path.name for path in files.iterdir()} | {"nowhere", "nowhere.txt", "new"}


def placed(argument: str, files: Path, places: set[str]) -> str:
    """An argument with the place of the file that it names."""
    key, _, value = argument.partition("=")
    if value.split("/")[0] in places and key in KEYS_OF_FILES:
        return f"{key}={files / value}"
    return argument


KEYS_OF_FILES = {
    "data.path", "data.val_path", "init_from", "resume", "repeat", "checkpoint", "prompt_file", "text", "output", "paths.cache",
    "paths.outputs", "hydra.run.dir", "samples", "reference",
}  # fmt: skip


def listing(folder: Path) -> set[Path]:
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    return found - {Path("unfinished/train.log")}  # a run that is resumed has a log


@pytest.fixture
def wrong_use(
    call: Callable[..., Any],
    files: Path,
    places: set[str],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[str, str], str]:
    """Uses a command wrongly and returns what it says: one line, with exit code 1, and nothing written."""

    def use(name: str, arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        wrong = [placed(argument, files, places) for argument in arguments.split()]
        if name in ("train", "plan") and not arguments.startswith(("resume", "repeat")):
            run = [] if "hydra.run.dir" in arguments else ["hydra.run.dir=run"]
            wrong = [*options, *run, *wrong]
        before = listing(files)
        with pytest.raises(SystemExit) as stop:
            call(name, *wrong)
        out, error = capfd.readouterr()
        assert stop.value.code == 1, error
        assert error.count("\n") == 1, error
        assert error.startswith("error: ")
        assert "Traceback" not in out
        assert "this must not be printed" not in out
        assert listing(files) == before
        assert listing(tmp_path) == set()  # no run directory either
        return error

    return use


@pytest.mark.parametrize(("name", "arguments", "line"), TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE])
def test_wrong_use_ends_in_one_line(
    name: str, arguments: str, line: str, wrong_use: Callable[[str, str], str]
) -> None:
    error = wrong_use(name, arguments)
    assert re.search(line, error), error


def begin(cfg: DictConfig) -> None:
    """Everything that a run does before it looks at its data."""
    validate(cfg)
    build_trainer(cfg, build_parts(cfg).callbacks, loggers=[])


@pytest.fixture(scope="module")
def good() -> DictConfig:
    """As `options`, with data that does not exist."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*TINY, "data.path=nowhere.txt", "paths.run=run", "paths.outputs=outputs"])
    begin(cfg)
    return cfg


@pytest.mark.parametrize(("override", "line"), KEYS, ids=[row[0] for row in KEYS])
def test_wrong_value_is_refused_before_anything_is_read(override: str, line: str, good: DictConfig) -> None:
    wrong = copy.deepcopy(good)
    for part in OverridesParser.create().parse_overrides(override.split()):
        OmegaConf.update(wrong, part.key_or_group, part.value(), force_add=True)

    with pytest.raises((ValueError, MisconfigurationException)) as error:
        begin(wrong)
    said = one_line(error.value)
    assert "\n" not in said
    assert re.search(line, said), said


MISSING: list[tuple[str, str, str]] = [
    # package that is not installed, command, arguments; the line says what to install
    ("wandb", "train", "logger=wandb data.path=nowhere.txt"),  # found before the data is looked at
    ("mlflow", "train", "logger=mlflow data.path=nowhere.txt"),
    ("datasets", "prepare", "data=huggingface data.name=anyone/anything"),
    ("pyarrow", "train", "data.path=broken.parquet"),
    ("sacrebleu", "evaluate", "checkpoint=nowhere samples=good.txt reference=good.txt"),
    ("gradio", "demo", "checkpoint=nowhere port=0"),
]


@pytest.mark.parametrize(("package", "name", "arguments"), MISSING, ids=[row[0] for row in MISSING])
def test_missing_package_is_named_with_what_brings_it(
    package: str, name: str, arguments: str, wrong_use: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (package, "gpt_lightning.serving.server", "gpt_lightning.serving.page"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
        if module != package:
            monkeypatch.delitem(sys.modules, module, raising=False)
    assert re.search(rf"\b{package}\b.* pip install 'gpt-lightning\[\w+\]'", wrong_use(name, arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu_is_told_before_the_data_is_looked_at(wrong_use: Callable[..., str]) -> None:
    line = wrong_use("train", "device=cuda data.path=nowhere.txt")
    assert "device.accelerator=cuda: torch finds no NVIDIA GPU here; use device=cpu" in line


def test_missing_vocabulary_without_a_network_ends_in_one_line_of_a_real_process(
    command: Callable[..., Any], options: list[str], tmp_path: Path
) -> None:
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    result = command("train", *options, "hydra.run.dir=run", "tokenizer=gpt2", **nowhere)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    line = (
        "the GPT-2 vocabulary is not in tiktoken's cache .* set TIKTOKEN_CACHE_DIR .* or choose tokenizer=bpe"
    )
    assert re.search(line, result.stderr)
    assert "Traceback" not in result.stdout
