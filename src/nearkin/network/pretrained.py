"""Where timm's pretrained weights come from: the local cache first, so that a filled one needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearkin.errors import ModelError


def pretrained_options(model: str) -> dict[str, Any]:
    """What `timm.create_model` needs to start from pretrained weights. Raises ModelError where timm has none."""
    import timm

    published = timm.get_pretrained_cfg(model)
    if published is None or not published.has_weights:
        raise ModelError(
            f"timm has no pretrained weights for {model}; leave out --pretrained or give --weights FILE."
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
