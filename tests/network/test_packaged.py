"""The packaged ImageNet weights: they are the ones that are known, and nothing else is loaded in their place."""

import pickle
import shutil
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from sklearn.datasets import load_sample_image

from nearkin.data.transforms import EvalSpec, eval_transform
from nearkin.errors import ModelError
from nearkin.network import PACKAGED, build_backbone, packaged

NAME = "tf_efficientnet_lite0"


def build(channels=3, **options):
    return build_backbone(
        NAME,
        pretrained=True,
        channels=channels,
        image_size=64,
        stem="auto",
        drop_path=0.0,
        options=options,
    )


def ramps():
    """One image `[1, 3, 64, 64]` in [0, 1]: ramps to the right and down, and diagonal stripes."""
    side = torch.arange(64.0)
    across, down = side.expand(64, 64), side[:, None].expand(64, 64)
    return torch.stack([across / 63, down / 63, (across + down) % 16 / 15])[None]


def test_the_features_of_a_generated_image():
    backbone = build()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (backbone.mean, backbone.std))
    with torch.no_grad():
        features = backbone.module.eval()((ramps() - mean) / std)
    assert features.shape == (1, 1280)
    assert features.sum().item() == pytest.approx(870.6857, rel=1e-4)
    assert features.square().sum().item() == pytest.approx(3329.656, rel=1e-4)
    assert features.argmax().item() == 171


def test_two_photographs_are_named_by_the_weights_and_their_classifier():
    """All 296 tensors, in their order, in timm's network for 1 000 classes: no other order could do this."""
    path = Path(find_spec(PACKAGED[NAME].module).submodule_search_locations[0])
    given = list(torch.load(path / PACKAGED[NAME].file, weights_only=True).values())
    network = timm.create_model(NAME).eval()
    assert len(given) == len(network.state_dict()) == 296
    network.load_state_dict(dict(zip(network.state_dict(), given, strict=True)))
    transform = eval_transform(EvalSpec.for_size(224, 3, 0.875))
    names = timm.data.ImageNetInfo()
    for photograph, kinds in (("china.jpg", {"palace", "monastery"}), ("flower.jpg", {"daisy"})):
        pixels = torch.tensor(load_sample_image(photograph)).permute(2, 0, 1)
        with torch.no_grad():
            best = network(transform(pixels)[None] / 127.5 - 1)[0].topk(5).indices
        assert kinds & {names.index_to_description(int(one)) for one in best}


def test_every_tensor_is_loaded():
    fresh = build_backbone(
        NAME, pretrained=False, channels=3, image_size=64, stem="auto", drop_path=0.0
    )
    loaded, random = build().module.state_dict(), fresh.module.state_dict()
    counters = [name for name in random if name.endswith("num_batches_tracked")]
    same = [name for name in random if torch.equal(loaded[name], random[name])]
    assert set(same) <= set(counters)
    assert len(random) == 294


def test_grey_images_sum_the_colours_of_the_first_filters():
    colours, grey = build().module.conv_stem.weight, build(channels=1).module.conv_stem.weight
    torch.testing.assert_close(grey, colours.sum(1, keepdim=True))


def test_a_module_of_other_shapes_is_refused():
    other = timm.create_model("tf_efficientnet_lite1", num_classes=0)
    with pytest.raises(ModelError, match="do not fit these options of the model"):
        packaged.load_packaged(other, NAME)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package that may be damaged. Returns the file and a function that accepts its new checksum."""
    known = PACKAGED[NAME]
    folder = Path(next(iter(find_spec(known.module).submodule_search_locations)))
    shutil.copytree(folder, tmp_path / "copied_weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(packaged.PACKAGED, NAME, known._replace(module="copied_weights"))
    file = tmp_path / "copied_weights" / known.file

    def accept():
        digest = sha256(file.read_bytes()).hexdigest()
        changed = packaged.PACKAGED[NAME]._replace(sha256=digest)
        monkeypatch.setitem(packaged.PACKAGED, NAME, changed)

    return file, accept


def test_one_flipped_bit_is_refused(copied):
    file, _ = copied
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        build()


def test_code_in_the_file_does_not_run_even_with_the_right_checksum(copied, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    file, accept = copied
    file.write_bytes(pickle.dumps({"conv_stem.weight": Hostile()}))
    accept()
    with pytest.raises(ModelError, match=r"could run code|no PyTorch checkpoint"):
        build()
    assert not (tmp_path / "ran").exists()


def test_code_of_the_package_does_not_run(copied):
    file, _ = copied
    (file.parents[1] / "__init__.py").write_text("raise SystemExit(7)")
    assert build().dim == 1280


def test_a_missing_file_and_a_missing_package_say_what_to_do(copied, monkeypatch):
    file, _ = copied
    file.unlink()
    with pytest.raises(ModelError, match="cannot be read .*install efficientnet-lite0"):
        build()
    gone = packaged.PACKAGED[NAME]._replace(module="no_such_weights")
    monkeypatch.setitem(packaged.PACKAGED, NAME, gone)
    with pytest.raises(ModelError, match="is not installed.*--from-scratch"):
        build()
