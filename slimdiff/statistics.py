"""The statistics file: what calibration hands to compression. One safetensors file, each tensor with its checksum.

Tensors: `<group>:<statistic>.products` (packed lower triangles of the centred products of each head), `.mean`,
`.energy` (in each tenth of the sampler's calls), and `states.*` (see `states.py`); of patches `.shifted`, `.sums` (see
`patches.py`) and `.energy`. Products are float32, in an unfinished file float64. The metadata's `slimdiff` entry is one
JSON object: format version, model reference and fingerprint, recipe, conditions, number of prompts done, token
counts, library versions, checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimdiff.errors import StatisticsError
from slimdiff.files import replacing
from slimdiff.gram import Gram, Moments
from slimdiff.outputs import statistics_near
from slimdiff.patches import Patches, PatchMoments
from slimdiff.recipe import WHOLE, Recipe, Shard
from slimdiff.states import States

FORMAT = 2


@dataclass
class Statistics:
    """The sums of a calibration over the first `done` prompts of its recipe, or of a part of them.

    `conditions` are those of `conditions.conditions`.
    """

    model: str
    model_options: dict[str, str]
    fingerprint: str
    recipe: Recipe
    grams: dict[str, Gram | Patches] = field(default_factory=dict)
    states: States = field(default_factory=States)
    done: int = 0
    loras: tuple[tuple[str, float], ...] = ()
    shard: Shard = WHOLE
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> range:
        """The prompts, by their numbers in the recipe, that it is to cover."""
        return self.shard.of(len(self.recipe.prompts))

    def write(self, path: Path, grams: Iterable[tuple[str, Gram | Patches]] | None = None) -> None:
        """Write the file whole or not at all. `grams` gives its own, one at a time, where memory is dear.

        Raises OutputError if it cannot be written.
        """
        dtype = torch.float32 if self.done == len(self.prompts) else torch.float64
        tensors: dict[str, Tensor] = {}
        tokens: dict[str, float] = {}
        for key, gram in self.grams.items() if grams is None else grams:
            tensors |= {f"{key}.{name}": tensor for name, tensor in _stored(gram, dtype).items()}
            tokens[key] = gram.count
        tensors |= {f"states.{name}": tensor.contiguous() for name, tensor in self.states.tensors().items()}
        metadata = {
            "format": FORMAT,
            "model": self.model,
            "model_options": self.model_options,
            "fingerprint": self.fingerprint,
            "loras": self.loras,
            "recipe": self.recipe.to_json(),
            "conditions": self.conditions,
            "shard": (self.shard.part, self.shard.parts),
            "done": self.done,
            "tokens": tokens,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__,
                         "transformers": transformers.__version__},
            "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
        }  # fmt: skip
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, {"slimdiff": json.dumps(metadata), "digest": _digest(metadata)})
            except SafetensorError as error:
                raise OSError(str(error)) from error


def _stored(gram: Gram | Patches, dtype: torch.dtype) -> dict[str, Tensor]:
    if isinstance(gram, Patches):
        sums = {"shifted": gram.products.to("cpu", dtype), "sums": gram.sums.cpu()}
    else:
        sums = {"products": gram.packed.to("cpu", dtype), "mean": gram.mean.cpu()}
    return {**sums, "energy": gram.energy.cpu()}


def _checksum(tensor: Tensor) -> str:
    data = tensor.reshape(-1).view(torch.uint8).numpy().data  # NumPy knows no bfloat16
    return hashlib.sha256(data).hexdigest()[:16] if tensor.numel() else "empty"


def _digest(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


class StatisticsFile:
    """A statistics file opened for reading; tensors are read, and their checksums verified, as they are asked for.

    Raises StatisticsError if the file is missing, truncated, damaged, or written by a newer slimdiff.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            near = statistics_near(path)
            way = f"Pass {near}." if near else "Pass the file that 'slimdiff calibrate' wrote."
            raise StatisticsError(f"{path} is a folder, and this takes a statistics file. {way}")
        if not path.is_file():
            raise StatisticsError(f"There is no statistics file {path}. Run 'slimdiff calibrate' first.")
        try:
            self._file = safe_open(path, framework="pt")
            stored = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"it cannot be opened ({error})") from error
        if "slimdiff" not in stored:
            raise StatisticsError(f"{path} is a safetensors file, but not a statistics file of 'slimdiff calibrate'.")
        try:
            self.metadata: dict[str, Any] = json.loads(stored["slimdiff"])
        except json.JSONDecodeError as error:
            raise self._damaged("its metadata cannot be read") from error
        if self.metadata.get("format", 0) > FORMAT:
            raise StatisticsError(
                f"{path} was written by a newer slimdiff (format {self.metadata['format']}); upgrade."
            )
        if self.metadata.get("format", 0) < FORMAT:
            raise StatisticsError(f"{path} was written by an older slimdiff and lacks sums; calibrate again.")
        if _digest(self.metadata) != stored.get("digest"):
            raise self._damaged("its metadata does not match its checksum")

    def _damaged(self, why: str) -> StatisticsError:
        return StatisticsError(f"{self.path} is truncated or damaged: {why}. Calibrate again, or copy the file again.")

    @property
    def model(self) -> str:
        return str(self.metadata["model"])

    @property
    def model_options(self) -> dict[str, str]:
        """What `source.find` was told beside the model: variant, revision, config, vae."""
        return dict(self.metadata.get("model_options", {}))

    @property
    def loras(self) -> tuple[tuple[str, float], ...]:
        """Files and scales of the LoRAs that were merged into the model."""
        return tuple((file, scale) for file, scale in self.metadata.get("loras", ()))

    @property
    def fingerprint(self) -> str:
        return str(self.metadata["fingerprint"])

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.metadata["recipe"])

    @property
    def shard(self) -> Shard:
        return Shard(*self.metadata.get("shard", (1, 1)))

    @property
    def conditions(self) -> dict[str, Any]:
        """Of the pipeline that ran, beside its UNet (see `conditions.conditions`); files did not always hold them."""
        return dict(self.metadata.get("conditions", {}))

    @property
    def done(self) -> int:
        """Prompts that were run."""
        return int(self.metadata["done"])

    @property
    def prompts(self) -> range:
        """The prompts, by their numbers in the recipe, that it is to cover."""
        return self.shard.of(len(self.recipe.prompts))

    def digest(self) -> str:
        """Names the file's whole content: its metadata hold the checksums of all tensors."""
        return _digest(self.metadata)

    def tensor(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"{name} cannot be read") from error
        if _checksum(tensor) != self.metadata["checksums"].get(name):
            raise self._damaged(f"{name} does not match its checksum")
        return tensor

    def gram(self, key: str, device: torch.device | str = "cpu") -> Gram:
        """The accumulator of one statistic. Raises StatisticsError if it is missing or has seen no token."""
        count = self._count(key)
        mean = self.tensor(f"{key}.mean")
        gram = Gram(mean.shape[1], mean.shape[0], device)
        gram.packed = self.tensor(f"{key}.products").to(device).double()
        gram.mean, gram.count = mean.to(device), count
        if f"{key}.energy" in self.metadata["checksums"]:  # files of format 2 did not always hold it
            gram.energy = self.tensor(f"{key}.energy").to(device)
        return gram

    def patches(self, key: str, device: torch.device | str = "cpu") -> Patches:
        """As `gram`, for a statistic of patches."""
        count = self._count(key)
        sums = self.tensor(f"{key}.sums")
        patches = Patches(sums.shape[1], device)
        patches.products = self.tensor(f"{key}.shifted").to(device).double()
        patches.sums, patches.count = sums.to(device), count
        patches.energy = self.tensor(f"{key}.energy").to(device)
        return patches

    def sums(self, key: str, device: torch.device | str = "cpu") -> Gram | Patches:
        """The accumulator of a statistic of whatever kind."""
        is_patches = f"{key}.shifted" in self.metadata["checksums"]
        return self.patches(key, device) if is_patches else self.gram(key, device)

    def _count(self, key: str) -> float:
        count: float = self.metadata["tokens"].get(key, 0)
        if not count:
            raise StatisticsError(f"{self.path} holds no tokens for {key}: it was made for other groups, or is empty.")
        return count

    def moments(self, key: str, device: torch.device | str = "cpu") -> Moments:
        return self.gram(key, device).moments()

    def patch_moments(self, key: str, device: torch.device | str = "cpu") -> PatchMoments:
        return self.patches(key, device).moments()

    def states(self) -> States:
        names = [name for name in self.metadata["checksums"] if name.startswith("states.")]
        return States.from_tensors({name.removeprefix("states."): self.tensor(name) for name in names})

    def read(self, device: torch.device | str = "cpu") -> Statistics:
        """Everything at once, to go on adding to it."""
        grams = {key: self.sums(key, device) for key in self.metadata["tokens"]}
        return Statistics(
            self.model, self.model_options, self.fingerprint, self.recipe, grams, self.states(), self.done, self.loras,
            self.shard, self.conditions,
        )  # fmt: skip

    def check_model(self, fingerprint: str, reference: str) -> None:
        """Raises StatisticsError if the file belongs to another model, was not finished, or is a part."""
        if fingerprint != self.fingerprint:
            raise StatisticsError(
                f"{self.path} was made from another model ({self.model}, fingerprint {self.fingerprint[:12]}) than "
                f"{reference} (fingerprint {fingerprint[:12]}). Calibrate this model, pass its own statistics file, "
                "or load it in the dtype it was calibrated in: bfloat16 rounds weights further than others."
            )
        self.check_finished()
        if self.shard.parts > 1:
            raise StatisticsError(
                f"{self.path} is part {self.shard} of a calibration, {self.done} of {len(self.recipe.prompts)} "
                "prompts. Put all parts together with 'slimdiff merge PART... -o ALL' and pass what that writes."
            )

    def check_finished(self) -> None:
        """Raises StatisticsError if prompts are missing that it is to cover."""
        if self.done < len(self.prompts):
            raise StatisticsError(
                f"{self.path} covers {self.done} of {len(self.prompts)} prompts; let 'slimdiff calibrate' end."
            )
