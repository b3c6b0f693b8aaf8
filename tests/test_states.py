"""Kept states: the inputs of real sampling, so complete that the UNet says the same again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import StableDiffusionPipeline
from torch import Tensor

from slimdiff.pipeline import encode, sample
from slimdiff.states import PER_PROMPT, PROMPTS, States, recorded

torch.set_num_threads(1)
TEXTS, NEGATIVES = ["a cat", "b", "two dogs", "e f g"], ["", "ugly", "", "x"]
STEPS = 11
CPU = torch.device("cpu")
Outputs = dict[tuple[int, float], list[Tensor]]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


def run(pipe: StableDiffusionPipeline, batch_size: int, guidance: float = 5.0) -> tuple[States, Outputs]:
    """States of a run, and all that its UNet put out: per prompt and timestep, its rows (negative half first)."""
    states, outputs = States(), {}
    pipe.scheduler.set_timesteps(STEPS)
    for start in range(0, len(TEXTS), batch_size):
        chosen = range(start, min(start + batch_size, len(TEXTS)))

        def hook(module: Any, args: Any, output: Any, chosen: range = chosen) -> None:
            halves = output[0].unflatten(0, (-1, len(chosen)))
            for row, prompt in enumerate(chosen):
                outputs[prompt, float(args[1])] = list(halves[:, row])

        handle = pipe.unet.register_forward_hook(hook)
        conditioning = encode(pipe, [TEXTS[i] for i in chosen], [NEGATIVES[i] for i in chosen])
        with recorded(pipe.unet, states, start, len(chosen), STEPS):
            sample(pipe, conditioning, list(chosen), steps=STEPS, guidance_scale=guidance, height=16, width=16)
        handle.remove()
    return states, outputs


@pytest.mark.parametrize(("batch_size", "guidance"), [(4, 5.0), (3, 5.0), (4, 1.0)])
def test_states_reproduce_what_the_pipeline_saw(pipe, batch_size, guidance):
    states, outputs = run(pipe, batch_size, guidance)
    halves = 2 if guidance > 1 else 1
    chosen = list(range(len(states.samples)))[::-1]
    arguments = states.batch(chosen, CPU, torch.float32)
    assert len(arguments["sample"]) == halves * len(chosen)
    with torch.no_grad():
        found = pipe.unet(**arguments).sample.unflatten(0, (halves, -1))
    for column, index in enumerate(chosen):
        seen = outputs[states.prompts[index], states.timesteps[index]]
        assert len(seen) == halves
        for half in range(halves):
            torch.testing.assert_close(found[half, column], seen[half], rtol=1e-4, atol=1e-5)
    if halves == 2:  # the halves are not the same thing twice
        assert (found[0] - found[1]).abs().max() > 1e-4


def test_each_prompt_has_its_states_spread_over_the_run(pipe):
    states, _ = run(pipe, 2)
    timesteps = pipe.scheduler.timesteps.tolist()
    starts = set()
    for prompt in range(len(TEXTS)):
        calls = sorted(timesteps.index(t) for t, p in zip(states.timesteps, states.prompts, strict=True) if p == prompt)
        assert len(calls) == len(set(calls)) == PER_PROMPT
        assert max(b - a for a, b in pairwise(calls)) <= 2  # 11 calls, 8 states
        starts.add(tuple(calls))
    assert len(starts) > 1
    assert all(len(parts) == len(TEXTS) for parts in states.conditioning.values())


def test_the_batch_size_does_not_change_the_set_of_states(pipe):
    (one, _), (other, _) = run(pipe, 4), run(pipe, 1)

    def by_name(states: States) -> dict[tuple[int, float], Tensor]:
        return dict(zip(zip(states.prompts, states.timesteps, strict=True), states.samples, strict=True))

    assert by_name(one).keys() == by_name(other).keys()
    for key, tensor in by_name(one).items():
        torch.testing.assert_close(tensor, by_name(other)[key], rtol=1e-3, atol=1e-4)


def test_tensors_hold_everything(pipe):
    states, _ = run(pipe, 4)
    again = States.from_tensors(states.tensors())
    for name, tensor in states.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    assert (again.timesteps, again.prompts) == (states.timesteps, states.prompts)
    assert again.conditioning.keys() == states.conditioning.keys() == {"encoder_hidden_states"}
    a, b = (s.batch([0, 5], CPU, torch.float32) for s in (states, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    empty = States.from_tensors(States().tensors())
    assert empty == States()


def test_the_pipeline_gets_the_same_conditioning_back(pipe):
    states, _ = run(pipe, 4)
    direct = encode(pipe, TEXTS[:3], NEGATIVES[:3])
    kept = states.for_pipeline(range(3), CPU, torch.float32)
    assert kept.keys() == {"prompt_embeds", "negative_prompt_embeds"}
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, direct[name], rtol=1e-5, atol=1e-6)


def test_sdxl_conditions_are_kept_with_their_rows():
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 24
    )
    count, states = 3, States()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    arguments = {
        "encoder_hidden_states": torch.randn(2 * count, 8, 12, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2 * count, 16, generator=generator),
            "time_ids": torch.arange(2 * count * 6.0).view(2 * count, 6),
        },
    }
    with torch.no_grad(), recorded(unet, states, 0, count, PER_PROMPT):
        for call in range(PER_PROMPT):
            output = unet(latents.repeat(2, 1, 1, 1), torch.tensor(float(call)), **arguments).sample
    last = [i for i, t in enumerate(states.timesteps) if t == PER_PROMPT - 1]
    assert [states.prompts[i] for i in last] == [0, 1, 2]
    with torch.no_grad():
        again = unet(**states.batch(last, CPU, torch.float32)).sample
    torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-5)
    assert torch.equal(states.for_pipeline(range(2), CPU, torch.float32)["negative_pooled_prompt_embeds"],
                       arguments["added_cond_kwargs"]["text_embeds"][:2])  # fmt: skip


def test_prompts_beyond_the_first_ones_are_not_recorded_and_hooks_go():
    unet, states = tiny_unet(), States()
    given = torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 8, 12)
    with torch.no_grad(), recorded(unet, states, PROMPTS, 2, 1):
        unet(given[0], given[1], encoder_hidden_states=given[2])
    assert states == States()
    with torch.no_grad(), recorded(unet, states, PROMPTS - 1, 2, 1):
        unet(given[0], given[1], encoder_hidden_states=given[2])
    assert states.prompts == [PROMPTS - 1]
    with pytest.raises(ZeroDivisionError), recorded(unet, states, 0, 2, 1):
        raise ZeroDivisionError
    assert not unet._forward_pre_hooks
