"""The transfer modules in a plain DCNv2: formulas, what they leave unchanged, that they learn, and what stays frozen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.towers import TripleTower
from models.transfer.adapter import NonLinearAdapter
from models.transfer.concat import Concat, FieldConcat
from models.transfer.dcnv2 import DCNv2
from models.transfer.gated_cross_attention import FieldAttention, GatedCrossAttention
from models.transfer.half_lives import AttendedConcat, HalfLifeAttention
from models.transfer.isomorphic import Isomorphic
from models.transfer.linear import Linear

ROWS, FIELDS, D, DIMS, B = 60, 5, 4, (6, 3), 32
WIDTH, K = FIELDS * D, sum(DIMS)


def upstream() -> TripleTower:
    torch.manual_seed(9)
    network = TripleTower(ROWS, 2, 2, 1, embedding=D, cross_layers=2, hidden=16, ur=4, ir=4, cr=8)
    return network.requires_grad_(False)  # as a loaded model's is


def click_model(plugs: dict[str, nn.Module] | None = None, beside: nn.Module | None = None, seed: int = 1) -> DCNv2:
    torch.manual_seed(seed)
    return DCNv2(ROWS, FIELDS, embedding=D, cross_layers=2, hidden=(16, 8), plugs=plugs, beside=beside)


def attention() -> FieldAttention:
    return FieldAttention(WIDTH, DIMS, FIELDS, heads=2)


MODELS: dict[str, Callable[[], DCNv2]] = {
    "linear": lambda: click_model({"embedding": Linear(WIDTH, K)}),
    "concat": lambda: click_model({"embedding": Concat(WIDTH, K, 3)}),
    "concat of each": lambda: click_model({"embedding": FieldConcat(WIDTH, DIMS, 3)}),
    "half-lives": lambda: click_model({"embedding": AttendedConcat(WIDTH, ((2, 3), (1, 3)), 3)}),
    "adapter": lambda: click_model({"embedding": NonLinearAdapter(WIDTH, K)}),
    "adapter from identity": lambda: click_model({"embedding": NonLinearAdapter(WIDTH, K, gain=2.0)}),
    "isomorphic": lambda: click_model(beside=Isomorphic(upstream())),
    "attention early": lambda: click_model({"embedding": attention()}),
    "attention stacked": lambda: click_model({"embedding": attention(), "cross1": attention(), "mlp1": FieldAttention(16, DIMS, 4)}),
}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Table rows, representations, clicks."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, ROWS, (B, FIELDS), generator=generator)
    return rows, torch.randn(B, K, generator=generator), (torch.rand(B, generator=generator) < 0.4).float()


def learn(model: DCNv2, batch: tuple[Tensor, Tensor, Tensor], steps: int) -> list[float]:
    rows, r, clicked = batch
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        adam.zero_grad()
        loss = binary_cross_entropy_with_logits(model(rows, r), clicked)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_every_module_learns_all_of_its_weights_the_same_way_twice(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.manual_seed(5)
    model = MODELS[name]()
    losses = learn(model, batch, 15)
    assert losses[-1] < 0.9 * losses[0]
    assert model(*batch[:2]).shape == (B,)
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert [name for name in idle if not name.endswith("key.bias")] == []  # softmax takes no notice of a bias common to all keys
    torch.manual_seed(5)
    again = MODELS[name]()
    assert learn(again, batch, 15) == losses


@pytest.mark.parametrize("name", MODELS)
def test_what_begins_unchanged_and_what_does_not(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, r, _ = batch
    plain, model = click_model(), MODELS[name]()
    shared = {key: value for key, value in plain.state_dict().items() if model.state_dict()[key].shape == value.shape}
    model.load_state_dict(shared, strict=False)
    same = torch.equal(model(rows, r), plain(rows))
    assert same == (name not in ("concat", "concat of each", "half-lives", "adapter"))


def test_feature_level_by_formula(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    r = batch[1].double()
    x = torch.randn(B, WIDTH, dtype=torch.float64)
    linear, concat, gate = Linear(WIDTH, K).double(), Concat(WIDTH, K, 3).double(), NonLinearAdapter(WIDTH, K, gain=1.5).double()
    nn.init.normal_(linear.projection.weight)
    for module, expected in (
        (linear, x.numpy() + r.numpy() @ w(linear, "projection.weight").T),
        (concat, np.hstack([x.numpy(), r.numpy() @ w(concat, "adapter.weight").T + w(concat, "adapter.bias")])),
        (gate, 1.5 * x.numpy() / (1 + np.exp(-(r.numpy() @ w(gate, "gate.weight").T + w(gate, "gate.bias"))))),
    ):
        out = module(x, r)
        assert out.shape == (B, module.width)
        np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-12)


def w(module: nn.Module, name: str) -> np.ndarray:
    return module.state_dict()[name].numpy()


def dense(module: nn.Module, name: str, x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x @ w(module, f"{name}.weight").T + w(module, f"{name}.bias")
    return result


def test_each_representation_has_an_adapter_of_its_own(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.manual_seed(3)
    x, r = torch.randn(B, WIDTH), batch[1]
    module = FieldConcat(WIDTH, DIMS, 3)
    found, other = module(x, r), module(x, torch.cat((r[:, : DIMS[0]], torch.zeros(B, DIMS[1])), dim=1))
    assert found.shape == (B, module.width) == (B, WIDTH + 3 * len(DIMS)) and torch.equal(found[:, :WIDTH], x)
    first = nn.functional.linear(r[:, : DIMS[0]], module.adapters[0].weight, module.adapters[0].bias)
    assert torch.allclose(found[:, WIDTH : WIDTH + 3], first) and torch.equal(found[:, : WIDTH + 3], other[:, : WIDTH + 3])
    assert not torch.allclose(found[:, WIDTH + 3 :], other[:, WIDTH + 3 :])


def test_half_lives_are_attended_by_formula(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.manual_seed(4)
    x, r = torch.randn(B, WIDTH, dtype=torch.float64), batch[1].double()
    module = AttendedConcat(WIDTH, ((2, 3), (1, 3)), 5).double()
    attention = module.adapters[0]
    assert isinstance(attention, HalfLifeAttention) and module.width == WIDTH + 10
    nn.init.normal_(attention.place)
    y = r[:, :6].numpy().reshape(B, 2, 3)
    scores = np.einsum("br,bkr->bk", dense(attention, "query", x.numpy()), dense(attention, "key", y) + w(attention, "place")) / np.sqrt(8)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert shares.std(0).min() > 0.05  # it depends on the impression
    attended = np.einsum("bk,bkv->bv", shares, dense(attention, "value", y))
    expected = np.hstack([x.numpy(), attended, dense(module, "adapters.1", r[:, 6:].numpy())])
    np.testing.assert_allclose(module(x, r).detach().numpy(), expected, atol=1e-10)


def test_gated_cross_attention_by_formula() -> None:
    torch.manual_seed(2)
    n, m, dim, source, heads = 4, 3, 8, 5, 2
    module = GatedCrossAttention(dim, source, heads).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(6, n, dim, dtype=torch.float64), torch.randn(6, m, source, dtype=torch.float64)
    mask = torch.rand(6, n, m) < 0.6
    mask[0, 0], mask[0, 1] = False, True
    out = module(x, y, mask)

    q, k, v = dense(module, "query", x.numpy()), dense(module, "key", y.numpy()), dense(module, "value", y.numpy())
    found = np.zeros((6, n, dim))
    for part in np.split(np.arange(dim), heads):
        scores = np.where(mask.numpy(), q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(dim / heads), -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    attended = dense(module, "out", found)
    hidden = dense(module, "gate.0", np.concatenate([x.numpy(), attended], axis=-1))
    gate = np.tanh(dense(module, "gate.2", hidden / (1 + np.exp(-hidden))))
    some = mask.any(-1).numpy()
    expected = np.where(some[..., None], x.numpy() + gate * attended, x.numpy())
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-10)
    cosine = (x.numpy() * attended).sum(-1) / np.linalg.norm(x.numpy(), axis=-1) / np.linalg.norm(attended, axis=-1)
    assert float(module.cosine) == pytest.approx(np.abs(cosine[some]).mean(), abs=1e-10)


def test_attention_sees_only_what_the_mask_allows() -> None:
    torch.manual_seed(3)
    module = GatedCrossAttention(4, 4)
    nn.init.normal_(module.gate[2].weight)
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[[True, False, False, False, False]], [[False] * 5]])  # of two users the second has no past
    out = module(x, y, mask)
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], x[0])
    out.sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.isfinite(x.grad).all() and y.grad[0, 0].any()
    assert not y.grad[0, 1:].any() and not y.grad[1].any()
    with pytest.raises(ValueError, match="4 is not one of 3"):
        GatedCrossAttention(4, 4, heads=3)


def test_the_isomorphic_module_is_upstreams_and_its_own(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    network = upstream()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = Isomorphic(network)
    embedded = network.table(batch[0])
    assert torch.equal(module(embedded.flatten(1)), network.representations(embedded)["cr"])
    learn(click_model(beside=module), batch, 5)
    assert not torch.equal(module.cross[0].weight, network.cross[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert Isomorphic(network, width=7)(torch.randn(B, 7)).shape == (B, 8)


def test_the_copy_is_frozen_for_so_many_steps(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    network = upstream()
    model = click_model(beside=Isomorphic(network, frozen_steps=3))
    module = model.beside
    assert isinstance(module, Isomorphic)
    learn(model, batch, 2)
    model.eval()
    model(batch[0])  # not a step
    model.train()
    restarted = click_model(beside=Isomorphic(network, frozen_steps=3))
    restarted.load_state_dict(model.state_dict())
    for each in (model, restarted):
        copied = each.beside
        assert isinstance(copied, Isomorphic)
        learn(each, batch, 1)
        assert torch.equal(copied.cross[0].weight, network.cross[0].weight)
        assert torch.equal(copied.mlp[0].weight, network.ad_branch[0].weight)
        assert each.beside_head.weight.any()  # it has learnt meanwhile
        learn(each, batch, 1)
        assert not torch.equal(copied.cross[0].weight, network.cross[0].weight)
        assert not torch.equal(copied.mlp[0].weight, network.ad_branch[0].weight)


def test_a_plug_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for Concat of width 23 at 'cross1'"):
        click_model({"cross1": Concat(WIDTH, K, 3)})
    with pytest.raises(ValueError, match="no place for Linear of width 20 at 'cross9'"):
        click_model({"cross9": Linear(WIDTH, K)})
    with pytest.raises(ValueError, match="20 is not one of 3"):
        FieldAttention(WIDTH, DIMS, 3)
