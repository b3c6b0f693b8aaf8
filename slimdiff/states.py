"""A small set of real UNet inputs, kept beside the statistics for probing and refining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PROMPTS = 32
"""Prompts whose states are kept: the first ones of the recipe."""

PER_PROMPT = 8
"""States kept of each prompt, spread evenly over its UNet calls with a start of its own."""


PIXELS = 65536
"""Latent pixels at once."""


@dataclass
class States:
    """`samples` (m, C, H, W), `timesteps` (m,) and `prompts` (m,), the index of each state's prompt.

    `conditioning` holds what the UNet got for each of those prompts, by name: (p, 2, ...) with the negative prompt
    first, or (p, 1, ...) without classifier-free guidance. Names are those of the UNet's arguments,
    `added_cond_kwargs.` in front of the members of that dictionary.
    """

    samples: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    conditioning: dict[str, list[Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"conditioning.{name}": torch.stack(parts) for name, parts in self.conditioning.items()}
        if self.samples:
            found["samples"] = torch.stack(self.samples)
        return {
            **found,
            "timesteps": torch.tensor(self.timesteps, dtype=torch.float64),
            "prompts": torch.tensor(self.prompts, dtype=torch.int64),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> States:
        return States(
            list(tensors.get("samples", ())),
            tensors["timesteps"].tolist(),
            tensors["prompts"].tolist(),
            {name.removeprefix("conditioning."): list(t) for name, t in tensors.items() if name.startswith("cond")},
        )

    @property
    def halves(self) -> int:
        """Rows that the UNet runs for each state: 2 with classifier-free guidance, else 1."""
        return len(next(iter(self.conditioning.values()))[0])

    def sort(self) -> None:
        """Put them prompt by prompt, whatever ran in one batch."""
        order = sorted(range(len(self.prompts)), key=self.prompts.__getitem__)
        self.samples = [self.samples[i] for i in order]
        self.timesteps = [self.timesteps[i] for i in order]
        self.prompts = [self.prompts[i] for i in order]

    def extend(self, later: States) -> None:
        """Add the states of the prompts that follow."""
        self.samples += later.samples
        self.timesteps += later.timesteps
        self.prompts += later.prompts
        for name, parts in later.conditioning.items():
            self.conditioning.setdefault(name, []).extend(parts)

    def batches(
        self, chosen: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """`batch` for a part of the chosen states at a time, the smaller the larger they are, and how many it holds."""
        size = min(16, max(1, PIXELS // self.samples[0][0].numel()))
        for first in range(0, len(chosen), size):
            part = list(chosen[first : first + size])
            yield len(part), self.batch(part, device, dtype)

    def batch(self, chosen: list[int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """UNet arguments for some states, each once per half of its guidance: 2 m rows, negative half first."""

        def rows(parts: list[Tensor]) -> Tensor:
            halves = range(self.halves)
            return torch.cat([torch.stack([parts[self.prompts[i]][half] for i in chosen]) for half in halves])

        arguments: dict[str, Any] = {
            "sample": torch.stack([self.samples[i] for i in chosen]).repeat(self.halves, 1, 1, 1).to(device, dtype),
            "timestep": torch.tensor([self.timesteps[i] for i in chosen]).repeat(self.halves).to(device),
        }
        for name, parts in self.conditioning.items():
            outer, _, inner = name.rpartition(".")
            target = arguments.setdefault(outer, {}) if outer else arguments
            target[inner] = rows(parts).to(device, dtype)
        return arguments

    def for_pipeline(self, chosen: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What stands for the chosen prompts in a call of the pipeline."""
        names = {"encoder_hidden_states": "prompt_embeds", "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"}
        found = {}
        for name, argument in names.items():
            if name in self.conditioning:
                rows = torch.stack([self.conditioning[name][i] for i in chosen]).to(device, dtype)
                found[argument], found[f"negative_{argument}"] = rows[:, -1], rows[:, 0]
        return found


@contextmanager
def recorded(unet: nn.Module, states: States, first: int, count: int, calls: int) -> Iterator[None]:
    """Adds to `states` while `count` prompts, from the recipe's `first` on, run as one batch for `calls` UNet calls."""
    wanted = range(first, min(first + count, PROMPTS))
    call = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal call
        sample, timestep = args[0], args[1]
        for prompt in wanted:
            row = prompt - first
            if call == 0:
                _record_conditioning(states, kwargs, row, count)
            offset = (prompt * 0.618) % 1  # golden-ratio steps spread the starts evenly
            if call in {int((j + offset) * calls / PER_PROMPT) for j in range(PER_PROMPT)}:
                states.samples.append(sample[row].detach().to("cpu", copy=True))
                states.timesteps.append(float(timestep))
                states.prompts.append(prompt)
        call += 1

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
            states.sort()


def _record_conditioning(states: States, kwargs: dict[str, Any], row: int, count: int) -> None:
    given = {name: kwargs.get(name) for name in ("encoder_hidden_states", "timestep_cond")}
    given |= {f"added_cond_kwargs.{name}": value for name, value in (kwargs.get("added_cond_kwargs") or {}).items()}
    for name, value in given.items():
        if isinstance(value, Tensor):
            halves = value.shape[0] // count
            rows = torch.stack([value[half * count + row] for half in range(halves)])
            states.conditioning.setdefault(name, []).append(rows.detach().cpu())
