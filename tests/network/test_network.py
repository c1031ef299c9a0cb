"""Images in, Outputs out: normalisation, heads, freezing, dropout, copies."""

import copy

import pytest
import timm
import torch
from torch import nn

from nearkin.errors import ModelError
from nearkin.network import Network, build_backbone
from nearkin.objectives import Head
from nearkin.types import Outputs


class Means(nn.Module):
    """A backbone whose features can be worked out by hand: a BatchNorm and the mean of each channel."""

    def __init__(self, channels=3):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.seen = None

    def forward(self, images):
        self.seen = images
        return self.norm(images).mean((2, 3))


def heads():
    return {
        "projection": Head(nn.Linear(3, 4), "features", "embedding"),
        "contrast": Head(
            nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)), "embedding", "projection"
        ),
        "classifier": Head(nn.Linear(4, 5), "embedding", "logits"),
    }


def make(heads, **changes):
    torch.manual_seed(0)
    numbers = {"dim": 3, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)}
    return Network(Means(), heads, **(numbers | changes))


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)


def test_pixels_are_normalised(images):
    network = make({})
    network(images)
    expected = images.double() / 255
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 0.2), strict=True)):
        expected[:, channel] = (expected[:, channel] - mean) / std
    assert torch.allclose(network.backbone.seen.double(), expected, atol=1e-6)
    as_bytes = network.backbone.seen
    network(images.float() / 255)
    assert torch.equal(network.backbone.seen, as_bytes)
    network.double()(images.float() / 255)
    assert network.backbone.seen.dtype == torch.float64


def test_the_statistics_travel_with_the_weights():
    state = make({}).state_dict()
    other = make({}, mean=(0, 0, 0), std=(1, 1, 1))
    other.load_state_dict(state)
    assert other.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert other.std.flatten().tolist() == pytest.approx([0.5, 0.25, 0.2])


def test_grey_images_do_not_become_colour(images):
    with pytest.raises(ValueError, match="3 channels, not 1"):
        make({})(images[:, :1])


def test_heads_read_and_write_their_fields(images):
    network = make(heads()).eval()
    outputs = network(images)
    assert isinstance(outputs, Outputs)
    features = network.backbone(network.backbone.seen)
    embedding = network.heads["projection"](features)
    assert torch.equal(outputs.features, features)
    assert torch.equal(outputs.embedding, embedding)
    assert torch.equal(outputs.projection, network.heads["contrast"](embedding))
    assert torch.equal(outputs.logits, network.heads["classifier"](embedding))


def test_without_heads_the_embedding_is_the_features(images):
    outputs = make({})(images)
    assert outputs.embedding is outputs.features
    assert outputs.projection is None
    assert outputs.logits is None


def test_only_active_heads_run_and_learn(images):
    network = make({**heads(), "linear": Head(nn.Linear(3, 7), "features", "logits")})
    assert network.active == ("projection", "contrast", "classifier", "linear")
    network.activate(("linear",), freeze_backbone=True)
    assert network.active == ("linear",)
    ran = []
    for name, head in network.heads.items():
        head.register_forward_hook(lambda *_, name=name: ran.append(name))
    outputs = network.train()(images)
    assert ran == ["linear"]
    assert outputs.logits.shape == (6, 7)
    assert outputs.embedding is outputs.features
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained == {"heads.linear.weight", "heads.linear.bias"}
    modes = {name: head.training for name, head in network.heads.items()}
    assert modes == {"projection": False, "contrast": False, "classifier": False, "linear": True}
    assert not network.heads["contrast"][0].training
    assert not network.backbone.norm.training
    assert int(network.backbone.norm.num_batches_tracked) == 0

    network.activate(("projection", "classifier"), freeze_backbone=False)
    assert network.backbone.norm.training, "activate thaws at once"
    network.eval()
    assert not any(part.training for part in network.modules())
    network.activate(("projection", "classifier"), freeze_backbone=False)
    assert not any(part.training for part in network.modules()), "activate keeps the mode"
    network.train()
    inactive = {n.split(".")[1] for n, p in network.named_parameters() if not p.requires_grad}
    assert inactive == {"contrast", "linear"}


def test_what_its_author_fixed_stays_fixed():
    fixed = nn.Linear(3, 5)
    fixed.weight.requires_grad_(False)
    network = make({"fixed": Head(fixed, "features", "logits")})
    network.activate((), freeze_backbone=True)
    network.activate(("fixed",), freeze_backbone=False)
    assert not fixed.weight.requires_grad
    assert fixed.bias.requires_grad
    assert network.backbone.norm.weight.requires_grad


def test_the_order_of_the_stage_counts(images):
    network = make(heads())
    network.activate(("contrast", "projection"), freeze_backbone=False)
    network.key.set(0, 0, 0, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        network(images)  # contrast reads the features before projection has written
    needy = make({"late": Head(nn.Linear(2, 2), "logits", "projection")})
    with pytest.raises(ValueError, match="late reads logits"):
        needy(images)


def test_an_unknown_head_is_named():
    network = make(heads())
    with pytest.raises(
        ModelError, match="no head nonsense; it has projection, contrast, classifier"
    ):
        network.activate(("nonsense",), freeze_backbone=False)
    assert network.active == ("projection", "contrast", "classifier")


def test_a_backbone_with_its_classifier_is_refused(images):
    backbone = timm.create_model("test_resnet")
    network = Network(backbone, {}, dim=backbone.num_features, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match=r"gives \[4, 1000\], not pooled features .*num_classes=0"):
        network(torch.rand(4, 3, 32, 32))


def test_dropout_of_the_features_is_keyed(images):
    network = make({}, drop_rate=0.5)

    def features(images, offset):
        network.key.set(3, 4, offset, 1)
        network.backbone.norm.eval()
        return network(images).features

    whole = features(images, 0)
    assert 0 < int((whole == 0).sum()) < whole.numel()
    assert torch.equal(torch.cat([features(images[:2], 0), features(images[2:], 2)]), whole)
    network.eval()
    assert not bool((network(images).features == 0).any())


def test_the_heads_dropout_has_the_same_key_and_other_numbers():
    network = make(heads(), drop_rate=0.5)
    keyed = [m for m in network.modules() if type(m).__name__ == "KeyedDropout"]
    assert len(keyed) == 2
    assert all(m.key is network.key for m in keyed)
    assert len({m.number for m in keyed}) == 2


def test_a_deep_copy_has_its_own_key_and_freezes_its_own_parts(images):
    network = make(heads(), drop_rate=0.5)
    network.activate(("projection", "classifier"), freeze_backbone=True)
    network.key.set(0, 0, 0, 1)
    twin = copy.deepcopy(network)
    keys = {id(m.key) for m in twin.modules() if type(m).__name__ == "KeyedDropout"}
    assert keys == {id(twin.key)}
    assert twin.key is not network.key
    assert torch.equal(twin(images).features, network(images).features)
    twin.key.set(0, 1, 0, 1)
    assert not torch.equal(twin(images).features, network(images).features)
    twin.activate(("projection", "classifier"), freeze_backbone=False)
    twin.train()
    assert twin.backbone.norm.training
    assert not network.train().backbone.norm.training


def test_a_real_backbone_in_channels_last():
    backbone = build_backbone(
        "test_resnet", pretrained=False, channels=3, image_size=32, stem="auto", drop_path=0.2
    )
    head = Head(nn.Linear(backbone.dim, 5), "features", "logits")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module = copy.deepcopy(backbone.module).to(memory_format=layout)
        network = Network(
            module,
            {"classifier": copy.deepcopy(head)},
            dim=backbone.dim,
            mean=backbone.mean,
            std=backbone.std,
        )
        network.key.set(0, 0, 0, 2)
        results.append(network(images.contiguous(memory_format=layout)).logits)
    assert results[0].shape == (4, 5)
    assert torch.allclose(results[0], results[1], atol=1e-4)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("model", ["resnet18", "test_vit", "convnext_atto", "test_coatnet"])
def test_a_pass_without_gradient_equals_one_with(model, train, autocast, memory_format):
    torch.manual_seed(0)
    backbone = build_backbone(
        model, pretrained=False, channels=3, image_size=64, stem="default", drop_path=0.0
    )
    network = Network(backbone.module, {}, dim=backbone.dim, mean=backbone.mean, std=backbone.std)
    network.set_memory_format(memory_format)
    network.train(train)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = network(images).features
        assert expected.requires_grad
        with torch.no_grad():
            assert torch.equal(network(images).features, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("backward", [True, False])
def test_images_are_converted_to_the_memory_format(dtype, backward):
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    network = make({})
    given = images.clone()
    for name, layout in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        network.set_memory_format(name)
        with torch.set_grad_enabled(backward):
            network(images)
        assert network.backbone.seen.is_contiguous(memory_format=layout)
        assert torch.equal(images, given), "the images of the caller stay as they are"
