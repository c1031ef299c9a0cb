"""Two real processes against one: collectives, BatchNorm, keyed dropout, all in one network."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nearkin.distributed import gather_rows, sum_over_ranks
from nearkin.network import (
    Network,
    SyncBatchNorm,
    build_backbone,
    projection_head,
    synchronise_batchnorm,
)
from nearkin.objectives import Head

RANKS, VIEWS, IMAGES = 2, 2, 8
UNEVEN = (5, 11)
DTYPES = (torch.float64, torch.float32)


def build(dtype):
    """The same network in every process: BatchNorm in backbone and head, stochastic depth, dropout."""
    torch.manual_seed(0)
    backbone = build_backbone(
        "resnet10t", pretrained=False, channels=3, image_size=16, stem="auto", drop_path=0.3
    )
    heads = {
        "projection": Head(projection_head(backbone.dim, 64, 16), "features", "embedding"),
        "classifier": Head(nn.Linear(16, 5), "embedding", "logits"),
    }
    network = Network(
        backbone.module,
        heads,
        dim=backbone.dim,
        mean=backbone.mean,
        std=backbone.std,
        drop_rate=0.2,
    )
    return network.to(dtype)


def block(rank):
    """The images `[V, b, 3, 16, 16]` of a rank, contiguous in the global batch; rank None: of all."""
    images = torch.rand(VIEWS, IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return images if rank is None else images.chunk(RANKS, dim=1)[rank]


def gathered(rows):
    parts = gather_rows(rows).unflatten(0, (-1, VIEWS, IMAGES // RANKS))
    return parts.transpose(0, 1).flatten(0, 2)


def loss(embedding, logits):
    """Couples every row with every other one."""
    unit = nn.functional.normalize(embedding)
    labels = torch.arange(IMAGES).repeat(VIEWS) % 5
    return (unit @ unit.T).logsumexp(1).mean() + nn.functional.cross_entropy(logits, labels)


def step(network, images, offset, gather):
    """Outputs, gradients and statistics of one training step."""
    network.key.set(1, 2, offset, VIEWS)
    outputs = network(images.flatten(0, 1))
    embedding, logits = gather(outputs.embedding), gather(outputs.logits)
    loss(embedding, logits).backward()
    found = {"embedding": embedding.detach(), "logits": logits.detach()}
    found |= {f"grad {n}": p.grad for n, p in network.named_parameters()}
    return found | {f"buffer {n}": b for n, b in network.named_buffers()}


def network_step(rank, dtype, synchronised):
    network = build(dtype)
    if synchronised:
        synchronise_batchnorm(network, "cpu")
    found = step(network, block(rank), rank * IMAGES // RANKS, gathered)
    # What DDP does with gradients.
    return {n: sum_over_ranks(v) / RANKS if n.startswith("grad") else v for n, v in found.items()}


def uneven_batches():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(sum(UNEVEN), 3, 2, 2, generator=generator, dtype=torch.float64) * 2 + 1e4
    weights = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return rows, weights


def uneven_norm(rank):
    """BatchNorm over ranks with different numbers of rows, of a mean far larger than the deviation."""
    rows, weights = (part.split(UNEVEN)[rank] for part in uneven_batches())
    rows = rows.clone().requires_grad_()
    norm = SyncBatchNorm(nn.BatchNorm2d(3).double())
    outputs = norm(rows)
    (outputs * weights).sum().backward()
    weight = sum_over_ranks(norm.weight.grad)
    return {
        "outputs": outputs.detach(),
        "grad": rows.grad,
        "weight": weight,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


def collected(rank):
    """gather_rows of several dtypes, and its gradient."""
    rows = torch.arange(12.0).view(2, 2, 1, 3) + 100 * rank
    found = {
        str(dtype): gather_rows(rows.to(dtype))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
    }
    found["last"] = gather_rows(rows.contiguous(memory_format=torch.channels_last))
    for dtype in (torch.float32, torch.bfloat16):
        x = rows.to(dtype, copy=True).requires_grad_()
        weights = torch.arange(24).view(4, 2, 1, 3).to(dtype) * (rank + 1)
        (gather_rows(x) * weights).sum().backward()
        found[f"grad {dtype}"] = x.grad
    return found


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    found = {"uneven": uneven_norm(rank), "collected": collected(rank)}
    for dtype in DTYPES:
        found[str(dtype)] = network_step(rank, dtype, synchronised=True)
    found["local"] = network_step(rank, torch.float64, synchronised=False)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def error(value, reference):
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_two_processes_equal_one(ranks, dtype, tolerance):
    alone = step(build(dtype), block(None), 0, lambda rows: rows)
    assert sum(n.startswith("grad") for n in alone) > 30
    assert sum("running_var" in n for n in alone) > 10
    for found in ranks:
        assert found[str(dtype)].keys() == alone.keys()
        together = {n: v for n, v in alone.items() if n.startswith("grad")}
        whole = torch.cat([v.flatten() for v in together.values()])
        mine = torch.cat([found[str(dtype)][n].flatten() for n in together])
        assert error(mine, whole) <= tolerance
        for name in alone.keys() - together.keys():
            assert error(found[str(dtype)][name], alone[name]) <= tolerance, name


def test_local_statistics_would_be_found(ranks):
    alone = step(build(torch.float64), block(None), 0, lambda rows: rows)
    local = ranks[0]["local"]
    assert error(local["embedding"], alone["embedding"]) > 1e-3
    worst = max(error(local[n], alone[n]) for n in alone if n.startswith("grad"))
    assert worst > 0.05


def test_ranks_may_hold_different_numbers_of_rows(ranks):
    rows, weights = uneven_batches()
    rows.requires_grad_()
    norm = nn.BatchNorm2d(3).double()
    outputs = norm(rows)
    (outputs * weights).sum().backward()
    parts = zip(outputs.detach().split(UNEVEN), rows.grad.split(UNEVEN), strict=True)
    for found, (expected, grad) in zip((r["uneven"] for r in ranks), parts, strict=True):
        assert error(found["outputs"], expected) < 1e-10
        assert error(found["grad"], grad) < 1e-10
        assert error(found["weight"], norm.weight.grad) < 1e-10
        assert error(found["mean"], norm.running_mean) < 1e-14
        assert error(found["var"], norm.running_var) < 1e-12


def test_rows_are_gathered_in_the_order_of_ranks(ranks):
    rows = torch.arange(12.0).view(2, 2, 1, 3)
    expected = torch.cat([rows, rows + 100])
    for found in ranks:
        for name in (
            "torch.float64",
            "torch.float32",
            "torch.bfloat16",
            "torch.float16",
            "torch.int64",
            "last",
        ):
            assert torch.equal(found["collected"][name].double(), expected.double()), name


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_the_gradient_sums_over_ranks(ranks, dtype):
    # Rank r weighs by (r + 1) w, so that each row's gradient is 3 w.
    weights = 3 * torch.arange(24.0).view(4, 2, 1, 3)
    for found, expected in zip(ranks, weights.split(2), strict=True):
        assert torch.equal(found["collected"][f"grad {dtype}"].float(), expected)


def test_alone_nothing_is_copied():
    x = torch.ones(2, 3)
    assert gather_rows(x) is x
    assert sum_over_ranks(x) is x
