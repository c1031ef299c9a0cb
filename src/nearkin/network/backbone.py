"""Any timm model as a backbone: pooled features, a stem for small images, mean and standard deviation of the pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nearkin.errors import ConfigError, ModelError, first_line, nearest, printable
from nearkin.imports import import_eager
from nearkin.network.packaged import PACKAGED, load_packaged

MOST_WEIGHTS = 1 << 31  # in float32 as many bytes as the largest file of weights that is read
# What a timm model may raise for an image size, a number of channels or an option that it does not support.
UNSUPPORTED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def _limit_weights() -> Iterator[None]:
    """Raises ValueError once the model being built has more than `MOST_WEIGHTS`: options may come from anyone."""
    left = MOST_WEIGHTS

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else parameter.numel()
        if left < 0:
            raise ValueError(f"it has more than {MOST_WEIGHTS} weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _with_options(model: str, options: Mapping[str, Any]) -> str:
    """The model and its options, for a message."""
    shown = ", ".join(f"--model.{name} {value}" for name, value in options.items())
    return f"{model} with {shown}" if shown else model


@contextmanager
def _explain(
    model: str,
    options: Mapping[str, Any],
    channels: int,
    image_size: int,
    option: str = "--image-size",
) -> Iterator[None]:
    """Turns what timm raises inside the block into a ConfigError about an option, or the size and channels."""
    try:
        yield
    except UNSUPPORTED as error:
        shown = _with_options(model, options)
        if isinstance(error, TypeError):
            for name in options:
                if f"unexpected keyword argument '{name}'" in str(error):
                    raise ConfigError(
                        f"{model} takes no option {name}; leave out --model.{name}."
                    ) from None
            if "drop_path" in str(error):
                raise ConfigError(
                    f"{shown} has no stochastic depth; leave out --drop-path."
                ) from None
        raise ConfigError(
            f"{shown} cannot take images of {image_size} x {image_size} pixels and {channels} "
            f"channels ({first_line(error)}); try another {option} or --model."
        ) from error


def pretrained_options(model: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` for pretrained weights, from the hub's cache if they are there.

    Raises ModelError where timm publishes none.
    """
    published = import_eager("timm").get_pretrained_cfg(model)
    if published is None or not published.has_weights:
        raise ModelError(
            f"timm has no pretrained weights for {model}; give a file with --weights FILE, or start with "
            "--from-scratch."
        )
    cached = None if published.custom_load else _cached(published)
    if cached is None:
        return {"pretrained": True}
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(cached)}}


def _cached(published: Any) -> Path | None:
    """The safetensors file of these weights in the hub's cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    if not published.hf_hub_id:
        return None
    repository, _, revision = published.hf_hub_id.partition("@")
    name = published.hf_hub_filename or "model.safetensors"
    found = try_to_load_from_cache(repository, name, revision=revision or None)
    return Path(found) if isinstance(found, str) and name.endswith(".safetensors") else None


LARGEST_CONTIGUOUS = 16  # pixels; on a CPU channels_last is slower up to here (resnet10t: 1.1x)
SMALL_IMAGE = 64  # pixels; up to here `--stem auto` keeps the resolution in the first layer


class Backbone(NamedTuple):
    """module: `[N, C, H, W]` -> pooled features `[N, dim]`. mean, std: per channel, of pixels in [0, 1].

    stem: what `auto` was resolved to; give it to build the same network again.
    """

    module: nn.Module
    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stem: Literal["default", "small"]


def build_backbone(
    model: str,
    *,
    pretrained: bool,
    channels: int,
    image_size: int,
    stem: Literal["auto", "default", "small"],
    drop_path: float,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """A timm model without its classifier, for square images of `image_size` pixels.

    stem: `small` keeps the resolution of small images: the first convolution gets stride 1 and, where its kernel
    is 7 or wider, becomes a fresh 3x3; a max-pool after it stays. `auto` is `small` up to 64 pixels, unless the
    weights are pretrained, the first convolution cuts patches or the model then cannot take the images.
    options: arguments of the timm model, as `nearkin.config` allows them.
    drop_path: rate of stochastic depth; 0 keeps the default of the model. Dropout before the classifier is off, since
    `Network` has its own.

    Raises ConfigError for a model, size, number of channels, stem, rate or option that is not supported, ModelError for
    pretrained weights that do not exist or cannot be downloaded.
    """
    _check_name(model)
    given = dict(options or {})
    asked: dict[str, Any] = given | {"num_classes": 0, "in_chans": channels, "drop_rate": 0.0}
    if drop_path > 0.0:
        asked["drop_path_rate"] = drop_path
    with _explain(model, given, channels, image_size), _limit_weights():
        module = create_model(model, asked, image_size)
    _check_patches(model, module, image_size)
    if pretrained:
        module = _download(model, asked, image_size, _with_options(model, given))
    if stem == "small":
        if not _has_open_stem(module):
            raise ConfigError(
                f"--stem small does not fit {model}, whose first layer cuts patches; use --stem default."
            )
        _keep_resolution(module)
    elif stem == "auto" and image_size <= SMALL_IMAGE and not pretrained:
        small = _with_small_stem(module, channels, image_size)
        module, stem = (module, "default") if small is None else (small, "small")
    with _explain(model, given, channels, image_size):
        dim = _probe(module, channels, image_size)
    mean, std = channel_statistics(module, channels)
    return Backbone(module, dim, mean, std, "small" if stem == "small" else "default")


def prefers_adamw(module: nn.Module) -> bool:
    """Whether a backbone is usually trained with AdamW rather than SGD.

    True where it contains attention, a normalisation over the channels of each sample (LayerNorm, RMSNorm, GroupNorm
    with one group), or a first convolution that cuts the image into patches. The published recipes of such models use
    AdamW; those of convolutional networks with BatchNorm use SGD.
    """
    patches = any(_cuts_patches(n, c) for n, c in first_convolutions(module).items())
    return patches or any(_is_attention(m) or _is_layer_norm(m) for m in module.modules())


def _is_attention(module: nn.Module) -> bool:
    """Attention between tokens. Channel attention (SE, ECA, CBAM, split attention) has none of these marks in timm."""
    numbers = (getattr(module, mark, None) for mark in ("num_heads", "fused_attn"))
    return any(isinstance(n, int) for n in numbers) or type(module).__name__.endswith("Attention")


def _is_layer_norm(module: nn.Module) -> bool:
    from timm.layers.norm import RmsNorm, RmsNorm2d

    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    return isinstance(module, nn.LayerNorm | nn.RMSNorm | RmsNorm | RmsNorm2d)


def default_memory_format(
    module: nn.Module, device_type: str, image_size: int
) -> Literal["contiguous", "channels_last"]:
    """The memory format in which a backbone computes fastest on a device of this type ("cuda", "cpu", ...).

    CUDA: channels_last. CPU: channels_last where more than half of the weights are in 2D convolutions and images have
    more than 16 pixels a side (docs/performance.md). Elsewhere contiguous; on MPS channels_last gave wrong results.
    """
    if device_type == "cuda":
        return "channels_last"
    if device_type != "cpu" or image_size <= LARGEST_CONTIGUOUS:
        return "contiguous"
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    share = sum(m.weight.numel() for m in convolutions) / sum(
        p.numel() for p in module.parameters()
    )
    return "channels_last" if share > 0.5 else "contiguous"


def check_eval_size(module: nn.Module, dim: int, model: str, channels: int, size: int) -> None:
    """Raises ConfigError unless the backbone, as it was built, gives `dim` features for images of `size` pixels too."""
    with _explain(model, {}, channels, size, option="--eval-size"):
        seen = _probe(module, channels, size)
        if seen != dim:
            raise ValueError(f"it gives {seen} features, not {dim}")
    _check_patches(model, module, size, option="--eval-size")


def _check_name(model: str) -> None:
    if any(character in model for character in ":/\\"):
        raise ConfigError(
            f"--model {printable(model)} is no name of a timm model; give one like resnet50, and a file of "
            "weights with --weights FILE."
        )
    timm = import_eager("timm")
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or " `nearkin list models` shows all."
        raise ConfigError(f"timm has no model {printable(name)}.{hint}")
    known = timm.list_pretrained(f"{name}.*")
    if tag and model not in known:
        raise ConfigError(f"timm has no weights {printable(model)}.{nearest(model, known)}")


def create_model(model: str, options: dict[str, Any], image_size: int) -> nn.Module:
    """`timm.create_model`, for images of this size where the model depends on it."""
    timm = import_eager("timm")
    try:
        module: nn.Module = timm.create_model(model, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        module = timm.create_model(model, **options)  # takes images of any size
    return module


def _download(model: str, options: dict[str, Any], image_size: int, shown: str) -> nn.Module:
    """The same model with pretrained weights. It was built without them before, so that errors are of the download."""
    if model in PACKAGED:
        module = create_model(model, options, image_size)
        load_packaged(module, model)
        return module
    # The hub logs every retry without a network; one message is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return create_model(model, options | pretrained_options(model), image_size)
    except ModelError:
        raise
    except Exception as error:  # the hub, the network and a damaged cache raise many kinds
        why = (
            f"could not be downloaded ({first_line(error)}). Connect once to fill the cache, give a file with "
            "--weights FILE, or start with --from-scratch."
        )
        mismatch = any(words in str(error) for words in ("size mismatch", "state_dict"))
        if isinstance(error, RuntimeError) and mismatch:
            why = f"do not fit {shown}; leave out --pretrained or these options."
        raise ModelError(f"The pretrained weights of {model} {why}") from error


def first_convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that read the image, by name; empty where timm does not say which they are."""
    names = _description(module).get("first_conv") or ()
    parts = dict(module.named_modules())
    found = {n: parts.get(n) for n in ([names] if isinstance(names, str) else names)}
    convolutions = {n: part for n, part in found.items() if isinstance(part, nn.Conv2d)}
    return convolutions if len(convolutions) == len(found) else {}


def _description(module: nn.Module) -> dict[str, Any]:
    """timm's description of a model (`pretrained_cfg`)."""
    return dict(getattr(module, "pretrained_cfg", None) or {})


def _cuts_patches(name: str, convolution: nn.Conv2d) -> bool:
    tiles = convolution.kernel_size == convolution.stride and convolution.kernel_size != (1, 1)
    return tiles or "patch_embed" in name


def _has_open_stem(module: nn.Module) -> bool:
    """Whether the image is read by convolutions that overlap."""
    convolutions = first_convolutions(module)
    return bool(convolutions) and not any(_cuts_patches(n, c) for n, c in convolutions.items())


def _check_patches(
    model: str, module: nn.Module, image_size: int, option: str = "--image-size"
) -> None:
    """Raises ConfigError where patches do not cover the image: the model would ignore the last rows and columns."""
    convolutions = first_convolutions(module)
    if len(convolutions) != 1:
        return
    name, convolution = next(iter(convolutions.items()))
    patch = convolution.kernel_size[0]
    if (
        "patch_embed" in name
        and convolution.kernel_size == convolution.stride
        and image_size % patch
    ):
        below, above = image_size // patch * patch, (image_size // patch + 1) * patch
        raise ConfigError(
            f"{model} cuts images into patches of {patch} pixels, which do not fill {option} {image_size}; "
            f"use {f'{below} or ' if below else ''}{above}."
        )


def _with_small_stem(module: nn.Module, channels: int, image_size: int) -> nn.Module | None:
    """A copy with the small stem; None where the model cannot have one or computes nothing with it.

    Models with position embeddings (levit, coatnet, gcvit) expect the resolution that their own stem leaves.
    """
    if not _has_open_stem(module):
        return None
    small, state = deepcopy(module), torch.get_rng_state()
    _keep_resolution(small)
    try:
        _probe(small, channels, image_size)
    except UNSUPPORTED:
        torch.set_rng_state(state)  # a run that goes on, whose stem is known, draws nothing here
        return None
    return small


def _keep_resolution(module: nn.Module) -> None:
    for convolution in first_convolutions(module).values():
        convolution.stride = (1, 1)
        if max(convolution.kernel_size) >= 7:
            convolution.kernel_size = (3, 3)
            # 0 in classes that pad in forward
            convolution.padding = tuple(min(int(side), 1) for side in convolution.padding)
            outputs, inputs = convolution.weight.shape[:2]
            convolution.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def _probe(module: nn.Module, channels: int, image_size: int) -> int:
    """The number of features, from a pass over two black images."""
    training = module.training
    module.eval()
    with torch.no_grad():
        features = module(torch.zeros(2, channels, image_size, image_size))
    module.train(training)
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        raise ValueError("it gives no pooled features")
    return features.shape[1]


def channel_statistics(
    module: nn.Module, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, `channels` of each, from timm's description.

    One channel gets the average over the three, more than three repeat them in turn: timm adapts the filters of the
    first convolution in the same way (sum for one channel, repetition for more).
    """

    def for_channels(values: Any) -> tuple[float, ...]:
        given = tuple(float(value) for value in values)
        if channels == 1:
            return (sum(given) / len(given),)
        return tuple(given[number % len(given)] for number in range(channels))

    description = _description(module)
    return for_channels(description["mean"]), for_channels(description["std"])
