"""Encoders of the second modality: shapes, no leak between values, batched copies, and that they learn what there is to learn and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mechicl.errors import OptionError
from mechicl.models.toys.encoders import Encoder, Projector, build_encoder
from mechicl.models.toys.model import ToyTransformer, classify_with
from mechicl.models.toys.presets import preset

CASES: list[tuple[str, tuple[int, ...]]] = [
    ("mlp", (48,)), ("mlp", (1, 12, 12)), ("cnn", (48,)), ("cnn", (3, 16, 16)), ("transformer", (48,)), ("vit", (1, 14, 14)), ("vit", (3, 21, 14)),
]  # fmt: skip


def values(shape: tuple[int, ...], n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_features_and_classes_have_their_sizes_and_no_value_looks_at_another(kind: str, shape: tuple[int, ...]) -> None:
    encoder = build_encoder(kind, shape, 32, 10, seed=0)
    x = values(shape)
    assert encoder.d_feat == (32 if kind == "vit" else 16)
    assert encoder(x).shape == (6, encoder.d_feat)
    assert encoder.classify(x).shape == (6, 10)
    assert torch.allclose(encoder(x)[2:3], encoder(x[2:3]), atol=1e-5)
    assert torch.equal(encoder.train()(x), encoder.eval()(x))
    assert encoder(x).std(0).max() > 0  # and yet they differ


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_every_coordinate_of_a_value_is_read(kind: str, shape: tuple[int, ...]) -> None:
    encoder = build_encoder(kind, shape, 32, 10, seed=0, init="torch").double()
    x = values(shape, 64).double().requires_grad_()
    read = torch.autograd.grad(encoder(x).pow(2).sum(), x)[0].abs().amax(0)
    assert (read > 0).all()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_many_models_with_encoders_run_at_once_as_each_alone(kind: str, shape: tuple[int, ...]) -> None:
    def model(seed: int) -> ToyTransformer:
        encoder = build_encoder(kind, shape, 64, 10, seed=seed, init="torch")
        return ToyTransformer(
            preset("huang2026"), encoder=encoder, projector=Projector(encoder.d_feat, 64, seed=seed, init="torch"), seed=seed
        )

    models = [model(seed) for seed in range(2)]
    weights, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    tokens, second = values((8, 64), 4), values((3, *shape), 4)
    together = torch.vmap(lambda w: classify_with(models[0], w, tokens, second))(weights)
    for k, one in enumerate(models):
        assert torch.allclose(together[k], one.classify(tokens, second), atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize(("kind", "shape", "options"), [("mlp", (24,), {}), ("cnn", (24,), {}), ("transformer", (24,), {"patch": 6}),
                                                        ("vit", (1, 8, 8), {"patch": 4})])  # fmt: skip
@pytest.mark.parametrize("learnable", [True, False])
def test_an_encoder_learns_classes_and_from_random_labels_nothing(kind: str, shape: tuple[int, ...], options: Any, learnable: bool) -> None:
    """Four Gaussian classes, fresh noise at every step; where labels are drawn by lot it stays at chance."""
    torch.manual_seed(0)
    means, encoder = torch.randn(4, *shape), build_encoder(kind, shape, 32, 4, seed=1, init="torch", **options)
    learner = torch.optim.Adam(encoder.parameters(), lr=3e-3)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        classes = torch.randint(4, (n,))
        return means[classes] + 0.3 * torch.randn(n, *shape), classes

    for _ in range(80):
        x, classes = sample(64)
        loss = functional.cross_entropy(encoder.classify(x), classes if learnable else torch.randint(4, (64,)))
        learner.zero_grad()
        loss.backward()
        learner.step()
    x, classes = sample(400)
    accuracy = float((encoder.classify(x).argmax(-1) == classes).float().mean())
    assert accuracy > 0.95 if learnable else accuracy < 0.7  # four classes, each given one label as a whole: up to 2 of 4 agree by luck


def test_the_mlp_has_the_papers_shape_and_initial_weights() -> None:
    """D2 -> D1 -> D1 / 2 -> K2 with ReLUs; normal weights of deviation 0.02, no biases yet."""
    encoder = build_encoder("mlp", (512,), 64, 256, seed=0)
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 64), (64, 32), (32, 256)]
    assert all(float(m.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not m.bias.any() for m in linear)
    assert encoder(values((512,))).min() >= 0


def test_patches_are_cut_by_rows_and_columns() -> None:
    """Moving a picture by whole patches and turning round the places that were learnt leaves the features as they were."""
    encoder = build_encoder("vit", (1, 8, 8), 16, 4, patch=4, seed=0, init="torch")
    body: Any = encoder.body
    assert body.patch == 4
    x = values((1, 8, 8))
    cut = body._cut(x)
    assert torch.equal(cut[:, 1], x[:, 0, :4, 4:].flatten(1))
    before = encoder(x)
    with torch.no_grad():
        body.places[:, 1:] = body.places[:, 1:][:, [1, 0, 3, 2]]
    assert torch.allclose(encoder(x.roll(4, -1)), before, atol=1e-5)
    assert build_encoder("vit", (1, 105, 105), 16, 4).body.patch == 15  # type: ignore[union-attr]


def test_the_projector_is_two_matrices_without_biases() -> None:
    projector = Projector(8, 16, seed=0)
    x = values((8,))
    w1, w2 = projector.fc1.weight, projector.fc2.weight
    assert torch.allclose(projector(x), functional.gelu(x @ w1.T) @ w2.T, atol=1e-6)
    assert not projector(torch.zeros(1, 8)).any()
    assert float(w2.detach().std()) == pytest.approx(0.02, rel=0.15)


def test_a_seed_decides_the_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, same, other = (build_encoder("mlp", (8,), 8, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(Projector(4, 4, seed=5).fc1.weight, Projector(4, 4, seed=5).fc1.weight)


def test_features_and_patterns_of_an_encoder_are_hooked_within_a_toy() -> None:
    encoder = build_encoder("vit", (1, 8, 8), 64, 4, patch=4, seed=0)
    model = ToyTransformer(preset("huang2026"), encoder=encoder, projector=Projector(64, 64, seed=0))
    where = torch.tensor([[1, 4]]).expand(6, -1)
    given = {"inputs_embeds": values((5, 64)), "second_values": values((2, 1, 8, 8)), "second_pos": where}
    _, cache = model.run_with_cache(given)
    assert cache["encoder.hook_features"].shape == (12, 64)
    assert torch.allclose(cache["encoder.body.blocks.1.hook_pattern"].sum(-1), torch.ones(12, 1, 5), atol=1e-5)
    assert cache["hook_image_features"].shape == (6, 2, 64)


@pytest.mark.parametrize(("kind", "shape", "options", "rule"), [
    ("resnet", (8,), {}, "kind must be one of"),
    ("vit", (8,), {}, r"in_shape must be \(channels, height, width\)"),
    ("mlp", (8, 8), {}, "in_shape must be"),
    ("cnn", (0,), {}, "in_shape must be"),
    ("vit", (1, 8, 8), {"patch": 3}, "patch must divide"),
    ("transformer", (9,), {"patch": 2}, "patch must divide"),
    ("transformer", (8,), {"n_heads": 5}, "n_heads must divide"),
    ("mlp", (8,), {"init": "zeros"}, "init must be one of"),
])  # fmt: skip
def test_impossible_encoders_are_refused_with_the_rule(kind: str, shape: tuple[int, ...], options: dict[str, Any], rule: str) -> None:
    with pytest.raises(OptionError, match=rule):
        build_encoder(kind, shape, 16, 4, **options)


def test_values_of_another_shape_are_refused() -> None:
    encoder: Encoder = build_encoder("mlp", (8,), 16, 4)
    with pytest.raises(OptionError, match=r"values must have the shape \[m, 8\]"):
        encoder(values((9,)))
