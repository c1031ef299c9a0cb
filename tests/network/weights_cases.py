"""Networks and files that the tests of weights share."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from nearkin.errors import ModelError
from nearkin.network import Network, load_weights
from nearkin.objectives import Head


def make(seed=0, classes=5, channels=3):
    torch.manual_seed(seed)
    backbone = timm.create_model("test_resnet", num_classes=0, in_chans=channels)
    head = Head(nn.Linear(96, classes), "features", "logits")
    statistics = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return Network(backbone, {"classifier": head}, dim=96, **statistics)


def timm_tensors():
    """A timm state dict with a classifier for 1 000 classes."""
    torch.manual_seed(9)
    return timm.create_model("test_resnet").state_dict()


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def same(module, tensors, prefix=""):
    state = module.state_dict()
    return all(torch.equal(state[prefix + n], t) for n, t in tensors.items() if prefix + n in state)


def refused(path, *, module=None):
    """The sentence of the ModelError, after which the module is as it was."""
    module = module or make()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(module, path)
    assert same(module, before)
    assert caught.value.code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)
