#!/usr/bin/env python3
"""Writes tests/golden/A/original again as a distributed checkpoint, by torch's own writer from two processes:

  clients/python/tests/make_distcp.py clients/python/tests/data/distcp      needs torch (2.15 made what is committed)

Value tables and projections are sharded by rows or by columns as DTensors, the rest is replicated; there is optimizer state, too.
"""

import pathlib
import shutil
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

GOLDEN = pathlib.Path(__file__).resolve().parents[3] / "tests" / "golden"


def placement(name):
    if name.endswith(("values.weight", "wq.weight", "tok_embeddings.weight", ".keys")):
        return Shard(0)
    if name.endswith(("wo.weight", "w2.weight", "output.weight")):
        return Shard(1)
    return Replicate()


def run(rank, target):
    dist.init_process_group("gloo", init_method=f"file://{target}.rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state = torch.load(GOLDEN / "A/original/consolidated.pth", weights_only=True)["model"]
    model = {name: distribute_tensor(tensor, mesh, [placement(name)]) for name, tensor in state.items()}
    optim = {"state": {"norm.weight": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(64)}}, "param_groups": [{"lr": 1e-3}]}
    dcp.save({"model": model, "optim": optim}, checkpoint_id=target)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1]).resolve()
    shutil.rmtree(target, ignore_errors=True)
    multiprocessing.spawn(run, (str(target),), nprocs=2)
    pathlib.Path(f"{target}.rendezvous").unlink(missing_ok=True)
    shutil.copyfile(GOLDEN / "A/original/params.json", target / "params.json")
