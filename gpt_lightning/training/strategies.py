"""How devices share a run: Lightning's strategies, whose processes wait a bounded time for each other."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.training.processes import meet

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, which the first rank gets


class Meeting(ParallelStrategy):
    """Processes say whom they wait for at the start, and wait at most `seconds`."""

    seconds: float

    def setup_environment(self) -> None:
        self.set_world_ranks()  # type: ignore[attr-defined]  # of both strategies
        assert self.cluster_environment is not None
        meet(self.cluster_environment, self.seconds)
        super().setup_environment()

    def teardown(self) -> None:
        super().teardown()
        if torch.distributed.is_initialized():  # else the next run in this process would use its connections
            torch.distributed.destroy_process_group()


class DataParallel(Meeting, DDPStrategy):
    """Every device has the whole model and a part of each batch."""

    def __init__(self, timeout: float):
        super().__init__(timeout=timedelta(seconds=timeout))
        self.seconds = timeout


class Sharded(Meeting, ModelParallelStrategy):
    """Weights, gradients and optimizer state are spread over the devices (FSDP2), as is each batch.

    A checkpoint is the one that a single device would write, so that each strategy reads those of the others.
    """

    lightning_restore_optimizer = True

    def __init__(self, devices: int, timeout: float):
        super().__init__(
            data_parallel_size=devices,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout),
        )
        self.seconds = timeout

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # every process reads its shards alone: a mapped file is in memory only where it is read
        return dict(read_checkpoint(checkpoint_path, verify=False))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=FULL)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        found: Any = get_optimizer_state_dict(self.model, optimizer, options=FULL)
        groups = found.get("param_groups", [])  # empty but on the first rank
        names = [name for group in groups for name in group["params"]]
        number = {name: index for index, name in enumerate(names)}  # as an optimizer counts them
        return {
            "state": {number[name]: state for name, state in found.get("state", {}).items()},
            "param_groups": [{**g, "params": [number[name] for name in g["params"]]} for g in groups],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            state = {order[index]: value for index, value in saved["state"].items()}
            groups = [{**g, "params": [order[i] for i in g["params"]]} for g in saved["param_groups"]]
            named: Any = {"state": state, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, named, options=FULL)


def strategy(name: str, *, devices: int, timeout: float) -> Strategy | str:
    """The strategy of a name: auto, ddp, fsdp, or one of Lightning's, which is returned as it is."""
    if name == "fsdp":
        return Sharded(devices, timeout)
    return DataParallel(timeout) if name == "ddp" or (name == "auto" and devices > 1) else name


def blocks(net: nn.Module) -> list[nn.Module]:
    """The layers of a network that are alike, such as the blocks of a transformer: items of its lists.

    Raises:
        ValueError: If it has none.
    """
    found = [block for part in net.modules() if isinstance(part, nn.ModuleList) for block in part]
    if not found:
        raise ValueError(
            f"{type(net).__name__} has no nn.ModuleList of blocks, which trainer=fsdp and "
            "trainer.activation_checkpointing=true need"
        )
    return found


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights of a network over the devices of a mesh: block by block, and the rest.

    They stay in 32 bits, so that mixed precision is what it is on one device.
    """
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def recompute(block: nn.Module) -> None:
    """Keep only the inputs of a block for the backward pass, which then computes the rest again."""
    forward = block.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
        return forward(*args, **kwargs)

    block.forward = checkpointed


def whole_state(net: nn.Module) -> dict[str, Any]:
    """The weights of a sharded network, on the CPU of the first rank; a collective operation."""
    return get_model_state_dict(net, options=FULL)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its shards; a collective operation if it has some."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(other: Tensor, tensor: Tensor) -> Tensor:
    """A tensor, which every rank has whole, with the shards of another one."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
