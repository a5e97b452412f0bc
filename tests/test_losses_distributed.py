"""The full loss over several processes is that of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmd.losses import ManifoldLoss, full_manifold_loss, inter_image_loss, random_patch_loss

IMAGES, PATCHES, DIM = 4, 6, 8  # images of each process


def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, 5)).double()


def batch(world):
    generator = torch.Generator().manual_seed(1)
    shape = (world * IMAGES, PATCHES)
    return [torch.randn(*shape, d, generator=generator, dtype=torch.float64) for d in (DIM, 7)]


def losses_and_gradients(model, x, teacher):
    """Both ways to the full loss, with the gradients of its weighted double in the model."""
    tokens = model(x)
    term = ManifoldLoss(0.0, 0.0, 0.0, full=2.0)([tokens], [teacher])["full"]
    term.backward()
    loss = full_manifold_loss(tokens.detach(), teacher)
    return term.detach(), loss, [p.grad for p in model.parameters()]


def run_process(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=world)
    x, teacher = (part.chunk(world)[rank] for part in batch(world))
    model = DistributedDataParallel(student())
    term, loss, grads = losses_and_gradients(model, x, teacher)
    tokens = model.module(x).detach()
    local = [f(tokens, teacher) for f in (inter_image_loss, all_rows)]
    alone = None
    for each in range(world):  # every process has to make every group
        group = dist.new_group([each])
        if each == rank:
            alone = full_manifold_loss(tokens, teacher, group=group)
    torch.save((term, loss, grads, local, alone), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def all_rows(tokens, teacher):
    return random_patch_loss(tokens, teacher, num_patches=IMAGES * PATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_equal_one_with_the_whole_batch(world, tmp_path):
    torch.multiprocessing.spawn(run_process, (world, str(tmp_path)), nprocs=world)
    model = student()
    x, teacher = batch(world)
    term, loss, grads = losses_and_gradients(model, x, teacher)
    assert loss > 0.01
    close = {"rtol": 1e-6, "atol": 1e-9}
    with torch.no_grad():
        shards = [(model(a), b) for a, b in zip(x.chunk(world), teacher.chunk(world))]
    for rank, (tokens, shard) in enumerate(shards):
        got_term, got_loss, got_grads, local, alone = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got_term, term, **close)
        torch.testing.assert_close(got_loss, loss, **close)
        torch.testing.assert_close(got_grads, grads, **close)
        # The decoupled terms keep the paper's meaning, the batch of one process; so does a full
        # loss with a group of its own.
        expected = [f(tokens, shard) for f in (inter_image_loss, all_rows)]
        torch.testing.assert_close(local, expected, **close)
        torch.testing.assert_close(alone, full_manifold_loss(tokens, shard), **close)
