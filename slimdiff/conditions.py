"""What calibration depends on beside the UNet and the recipe: the sampler and the text encoders."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

SAMPLES = 64
"""Values of each weight that tell text encoders apart: whatever trains or merges, changes nearly all of them."""


def conditions(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The scheduler's class, each of its options, and a digest of the text encoders; all of it JSON."""
    kind, config = type(pipe.scheduler), pipe.scheduler.config
    options = {f"scheduler's {name}": config[name] for name in inspect.signature(kind).parameters if name in config}
    found = {"scheduler": kind.__name__, **options, "text encoders": _texts(pipe)}
    return dict(json.loads(json.dumps(found, default=str)))


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first condition known of both that is not the same, in words."""
    for name in before:
        if name in now and before[name] != now[name]:
            return f"other {name}" if name == "text encoders" else f"another {name} ({before[name]}, not {now[name]})"
    return None


def _texts(pipe: DiffusionPipeline) -> str:
    """Of values as float16, without names, which change with the version of transformers."""
    digest = hashlib.sha256()
    for encoder in (getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)):
        for _, weight in sorted(encoder.named_parameters()) if encoder is not None else ():
            few = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)][:SAMPLES]
            digest.update(few.to("cpu", torch.float16).numpy().data)
    return digest.hexdigest()[:16]
