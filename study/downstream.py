"""One run: a click model of one arm, trained on downstream's days of a world, then measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.train import field_l2
from models.transfer.adapter import NonLinearAdapter
from models.transfer.concat import FieldConcat
from models.transfer.dcnv2 import DCNv2
from models.transfer.gated_cross_attention import FieldAttention
from models.transfer.half_lives import AttendedConcat
from models.transfer.isomorphic import Isomorphic
from models.transfer.linear import Linear
from study.arms import BLOCKS, LATEST, Affinity, Arm, Block, Counters, Memory, Now, Vectors
from study.metrics import FEW, measure
from study.past import Aggregate
from study.training import one_thread
from study.worlds import DAY, World

EMBEDDING = 10
BATCH = 256  # as upstream's 512 with half as many samples; the figures of seeds then lie closer together
STACKED = ("embedding", "cross1", "cross3")  # where gated cross-attention stands if it is stacked
FAR = 10.0
SHRINK = (1.0, 20.0)  # impressions of the mean click rate that a rate begins with
DOUBT = 3.0  # impressions at which a mean counts half

Floats = NDArray[np.float32]


def run(world: World, arm: Arm, rate: float, seed: int, tuning: bool = False) -> dict[str, Any]:
    """Train for one epoch and measure, on one thread. The same arguments give the same figures on the same machine.

    Args:
        rate: of Adam.
        tuning: measure on the last of downstream's days of training instead of the days of testing, and train on those before it.
    """
    began = time.perf_counter()
    test_from = world.dataset.test_from
    end = world.at(test_from) - world.first
    start = world.at(test_from - DAY) - world.first if tuning else end
    learnt, asked = slice(0, start), slice(start, end) if tuning else slice(end, None)
    data = world.downstream
    with torch.random.fork_rng(devices=[]), one_thread():
        parts = [part for name in arm.blocks for part in features(world, BLOCKS[name], learnt)]
        rows = torch.from_numpy(world.rows[world.first :])
        model = click_model(world, arm, [part.shape[1:] for part in parts], seed)
        r = torch.from_numpy(np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)) if parts else None
        cosines = train(model, rows, r, torch.from_numpy(data.clicked.astype(np.float32)), learnt, rate, field_l2(world.fields), seed)
        probability = predict(model, rows[asked], r[asked] if r is not None else None)
    return {
        **measure(probability, data.clicked[asked], data.user[asked], data.scenario[asked], cold(world, asked)),
        "cosines": cosines,
        "learnt": start,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def cold(world: World, asked: slice) -> dict[str, NDArray[np.bool_]]:
    """Which of the impressions asked are of users or items with FEW or no earlier impressions, and which of such as had none before them
    all. A user's first impressions of the days asked make him less cold while these go on, as they do in a stream."""
    subsets: dict[str, NDArray[np.bool_]] = {}
    before = world.first + asked.start
    for entity, past in world.past.items():
        keys: NDArray[np.int32] = getattr(world.impressions, entity)
        few = past.counts()[asked] < FEW
        new = ~np.isin(keys[world.first :][asked], keys[:before])
        subsets |= {f"cold {entity}s": few, f"warm {entity}s": ~few, f"new {entity}s": new}
    return subsets


def features(world: World, block: Block, learnt: slice) -> Iterator[Floats]:
    """A block's parts for downstream's n impressions, float32 [n, dim] each, of a Memory [n, half-lives, dim], on a common scale: mean 0
    and deviation 1 of what is learnt from. Where nothing was known there are zeros, the mean."""
    if isinstance(block, Now):
        yield scaled(world.output(block.source)[world.first :], None, learnt)
    elif isinstance(block, Counters):
        yield scaled(counters(world, block, learnt), None, learnt)
    elif isinstance(block, Affinity):
        yield scaled(affinity(world, block), None, learnt)
    elif isinstance(block, Memory):
        yield from memory(world, block, learnt)
    else:
        outputs = world.output(block.source)
        for entity in block.entities:
            known = world.past[entity].known(block.how, outputs, world.impressions.clicked)
            yield scaled(known.vectors, known.present, learnt)


def counters(world: World, block: Counters, learnt: slice) -> Floats:
    """[n, 4 an entity and half-life]. They are weights of columns without a vector, which any space can declare."""
    clicked = world.impressions.clicked
    nothing = np.empty((len(clicked), 0), np.float32)
    mean = world.downstream.clicked[learnt].mean()
    columns = []
    for half_life in block.half_lives:
        for past in (world.past[entity] for entity in block.entities):
            shown = past.known(Aggregate(half_life=half_life), nothing, clicked).weights
            clicks = past.known(Aggregate(half_life=half_life, impression=0.0, click=1.0), nothing, clicked).weights
            columns += [np.log1p(shown), np.log1p(clicks), *((clicks + few * mean) / (shown + few) for few in SHRINK)]
    return np.stack(columns, axis=1).astype(np.float32)


def affinity(world: World, block: Affinity) -> Floats:
    """[n, 6 a half-life]: dot products of means with the other's latest vector, each mean shrunk by W / (W + DOUBT).

    Target attention with a mean for its memory: sum over the past of weight · (x · now) is (W · mean) · now. A user's means are of the
    items' vectors and the other way round, which a space declares as it declares a mean of CR. Vectors are less their mean of upstream's
    days, or all would be alike.
    """
    clicked = world.impressions.clicked
    columns = []
    for entity, other, source in (("user", "item", "ir"), ("item", "user", "ur")):
        vectors = world.output(source)
        vectors = vectors - vectors[: world.first].mean(0)
        now = world.past[other].known(LATEST, vectors, clicked).vectors
        for half_life in block.half_lives:
            near = []
            for how in (Aggregate(half_life=half_life, impression=0.0, click=1.0), Aggregate(half_life=half_life, click=-1.0)):
                known = world.past[entity].known(how, vectors, clicked)
                near.append((known.vectors * now).sum(1) * known.weights / (known.weights + DOUBT))
            columns += [*near, near[0] - near[1]]
    return np.stack(columns, axis=1).astype(np.float32)


def memory(world: World, block: Memory, learnt: slice) -> Iterator[Floats]:
    """[n, half-lives, 4 + dim] an entity."""
    for entity in block.entities:
        counted = scaled(counters(world, Counters(block.half_lives, (entity,)), learnt), None, learnt)
        hows = [Aggregate(half_life=half_life, click=3.0) for half_life in block.half_lives]
        means = [mean for how in hows for mean in features(world, Vectors(block.source, how, (entity,)), learnt)]
        yield np.concatenate((counted.reshape(len(counted), len(hows), -1), np.stack(means, axis=1)), axis=2)


def scaled(vectors: Floats, present: NDArray[np.bool_] | None, learnt: slice) -> Floats:
    """Clipped at FAR deviations: a unit of a ReLU layer that was off in all that is learnt from would be thousands of them when on."""
    there = np.ones(len(vectors), np.bool_) if present is None else present
    sample = vectors[learnt][there[learnt]]
    if not len(sample):
        return np.zeros_like(vectors)
    found: Floats = np.clip((vectors - sample.mean(0)) / (sample.std(0) + 1e-6), -FAR, FAR)
    found[~there] = 0.0
    return found


def click_model(world: World, arm: Arm, shapes: Sequence[tuple[int, ...]], seed: int) -> DCNv2:
    """All arms of a seed begin with the same embeddings, unless with upstream's, and learn in the same order: what is paired is alike."""
    torch.manual_seed(2 * seed + 1)
    fields = world.rows.shape[1]
    dims = [prod(shape) for shape in shapes]
    width, given = fields * EMBEDDING, sum(dims)
    network = world.model.network
    plugs: dict[str, nn.Module] = {}
    if dims:
        match arm.module:
            case "concat":
                plugs = {"embedding": FieldConcat(width, dims, EMBEDDING)}
            case "linear":
                plugs = {"embedding": Linear(width, given)}
            case "adapter" | "adapter2":
                plugs = {"embedding": NonLinearAdapter(width, given, 2.0 if arm.module == "adapter2" else 1.0)}
            case "attention" | "stacked":
                places = STACKED if arm.module == "stacked" else STACKED[:1]
                plugs = {place: FieldAttention(width, dims, fields, heads=2) for place in places}
            case "half-lives":
                plugs = {"embedding": AttendedConcat(width, [(prod(shape[:-1]), shape[-1]) for shape in shapes], EMBEDDING)}
    beside = Isomorphic(network, frozen_steps=arm.frozen) if arm.beside else None
    torch.manual_seed(2 * seed)
    model = DCNv2(world.fields.rows, fields, embedding=EMBEDDING, plugs=plugs, beside=beside)
    if arm.table:
        model.table.load_state_dict(network.table.state_dict())
    return model


def train(
    model: DCNv2, rows: Tensor, r: Tensor | None, clicked: Tensor, learnt: slice, rate: float, l2: Tensor, seed: int
) -> list[list[float]]:
    """One epoch, with upstream's L2 on the embeddings a batch touches. Gives |cos(X, X')| of each attention at ten steps of it."""
    adam = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    order = torch.randperm(learnt.stop, generator=torch.Generator().manual_seed(seed))
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    shown = {*np.linspace(0, len(batches) - 1, 10).astype(int).tolist()}
    attentions = [plug for plug in model.plugs.values() if isinstance(plug, FieldAttention)]
    cosines: list[list[float]] = [[] for _ in attentions]
    model.train()
    for step, batch in enumerate(batches):
        adam.zero_grad()
        logits = model(rows[batch], r[batch] if r is not None else None)
        embedded: Tensor = model.table(rows[batch])
        loss = binary_cross_entropy_with_logits(logits, clicked[batch]) + (embedded.square().sum(2) * l2).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if step in shown:
            for course, attention in zip(cosines, attentions):
                course.append(round(float(attention.cosine), 4))
    return cosines


@torch.inference_mode()
def predict(model: DCNv2, rows: Tensor, r: Tensor | None, batch: int = 8192) -> Floats:
    """float32 [n]: probabilities of a click."""
    model.eval()
    parts = [
        model(rows[at : at + batch], r[at : at + batch] if r is not None else None).sigmoid().numpy() for at in range(0, len(rows), batch)
    ]
    return np.concatenate(parts)
