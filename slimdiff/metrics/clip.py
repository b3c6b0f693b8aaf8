"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well a picture fits its prompt, to a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from slimdiff.errors import SlimdiffError
from slimdiff.metrics.pictures import Pictures
from slimdiff.metrics.score import Score

MODEL = "openai/clip-vit-large-patch14"


class ClipMetric:
    """100 cos of the embeddings of a picture and its prompt, which is cut off where the model's text ends."""

    def __init__(self, model: str = MODEL) -> None:
        """`model` is a hub id or a folder of a CLIP model of transformers, with safetensors weights.

        Raises SlimdiffError if it cannot be had.
        """
        transformers.utils.logging.disable_progress_bar()
        self.name = model
        try:
            if not Path(model).is_dir():
                hf_hub_download(model, "config.json")  # fails once where the hub cannot be reached, not for every file
            self.network = CLIPModel.from_pretrained(model, use_safetensors=True, torch_dtype=torch.float32).eval()
            self.processor = CLIPProcessor.from_pretrained(model)
        except Exception as error:  # of the hub's client, the disk and the loaders, which share no class
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SlimdiffError(
                f"{model} cannot be loaded ({said}). Download it elsewhere ('hf download {model}') and name its folder "
                "with --clip-model."
            ) from error

    def check(self, prompts: int, size: tuple[int, int]) -> None:
        """Any pictures will do."""

    def measure(self, dense: Pictures, slim: Pictures, prompts: Sequence[str], device: torch.device) -> Score:
        self.network.to(device)
        sides = (self._scores(side, prompts, f"CLIP, {name}") for side, name in ((dense, "dense"), (slim, "slim")))
        return Score.paired("CLIP score", f"{self.name}, higher is better", *sides)

    @torch.no_grad()
    def _scores(self, pictures: Pictures, prompts: Sequence[str], what: str) -> Tensor:
        """One for each picture, (n,)."""
        longest = self.network.config.text_config.max_position_embeddings
        found, first = [], 0
        for batch in pictures.batches(what):
            texts = list(prompts[first : first + len(batch)])
            inputs = self.processor(
                text=texts, images=list(batch), return_tensors="pt", padding=True, truncation=True, max_length=longest
            )
            out = self.network(**inputs.to(self.network.device))
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            found.append(100 * cosine.cpu())
            first += len(batch)
        return torch.cat(found)
