"""Train the bundled miniature: a small but complete Stable Diffusion, from a seed, on a CPU or one GPU.

    torchrun --nproc-per-node 2 tools/train_demo.py --work build/demo -o slimdiff/demo/model

Stages, each kept under --work so that a second start goes on where the first one stopped: tokenizer, text encoder
(taught to name a caption's attributes), autoencoder, latents of the training pictures, UNet together with the text
encoder (epsilon prediction, scaled-linear betas, 10% of the captions dropped, EMA), export. `--widths`, `--layers`,
`--heads` and `--prediction` make other miniatures of the same kind.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from slimdiff import original_layout
from slimdiff.demo import scenes

TOKENS = 24
GUIDANCE, STEPS = 4.0, 25
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    if RANK == 0:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """All-reduce as one flat buffer; every parameter of these models gets a gradient in every step."""
    if WORLD == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= WORLD
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def fit(
    name: str, modules: dict[str, nn.Module], loss: Callable[[int], Tensor], steps: int, rate: float, args:
    argparse.Namespace, averaged: dict[str, nn.Module] | None = None, watch: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """Adam with warm-up and cosine decay; resumes from and saves to `<work>/<name>.pt`; the EMA goes to `averaged`."""
    path = args.work / f"{name}.pt"
    parameters = list(itertools.chain.from_iterable(m.parameters() for m in modules.values()))
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    everything = nn.ModuleDict({**modules, **{f"ema_{k}": m for k, m in (averaged or {}).items()}})
    start = 0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        everything.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        say(f"{name}: resumes at step {start} of {steps}")

    def save(step: int) -> None:
        if RANK == 0:
            state = {"modules": everything.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

    began, running = time.time(), 0.0
    for step in range(start, steps):
        scale = min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        with torch.autocast(args.device, torch.bfloat16):
            value = loss(step)
        optimizer.zero_grad(set_to_none=False)
        value.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, average in (averaged or {}).items():
            decay = min(args.ema, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(modules[key].parameters()), 1 - decay)
        running = value.item() if step == start else 0.99 * running + 0.01 * value.item()
        if (step + 1) % 100 == 0:
            say(
                f"{name}: step {step + 1}/{steps} loss {running:.4f} "
                f"{(time.time() - began) / (step + 1 - start):.3f} s/step"
            )
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save(step + 1)
            watch(step + 1)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own byte-pair layout with a vocabulary learned on the grammar: each of its words is one token."""
    stream = scenes.scenes(0, held_out=False)
    corpus = [next(stream).caption() for _ in range(5000)]
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(c) for c in range(33, 127)]
    raw.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    model = json.loads(raw.to_str())["model"]
    letters = [*alphabet, *(c + "</w>" for c in alphabet)]
    merges = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
    words = dict.fromkeys([*letters, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS,
        unk_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, projection_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def make_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    levels = len(args.widths)
    return UNet2DConditionModel(
        sample_size=scenes.SIDE // 4, in_channels=4, out_channels=4, layers_per_block=args.layers,
        block_out_channels=tuple(args.widths), down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels, cross_attention_dim=128, attention_head_dim=args.heads,
        norm_num_groups=16,
    )  # fmt: skip


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, latent_channels=4,
        sample_size=scenes.SIDE,
    )  # fmt: skip


def make_scheduler(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


def labels_of(scene: scenes.Scene) -> list[int]:
    """Every attribute as a class; index 0 of the second thing's classes means that there is none."""

    def of(thing: scenes.Thing | None) -> list[int]:
        if thing is None:
            return [0, 0, 0]
        sizes, colours = list(scenes.RADII), list(scenes.COLOURS)
        return [1 + sizes.index(thing.size), 1 + colours.index(thing.colour), 1 + scenes.KINDS.index(thing.kind)]

    places, grounds = list(scenes.PLACES), list(scenes.GROUNDS)
    second = scene.things[1] if len(scene.things) > 1 else None
    return [*of(scene.things[0]), *of(second), places.index(scene.place), grounds.index(scene.ground)]


CLASSES = [3, 7, 5, 3, 7, 5, len(scenes.PLACES), len(scenes.GROUNDS)]


def pictures_to_tensor(pictures: list[np.ndarray], device: str) -> Tensor:
    """(n, 3, SIDE, SIDE) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_latents(vae: AutoencoderKL, count: int, args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Latents, (count, 4, SIDE/4, SIDE/4) fp16, and captions of the training pictures."""
    stream, rng = scenes.scenes(args.seed, held_out=False), random.Random(args.seed)
    latents, captions = [], []
    for start in range(0, count, 256):
        batch = [next(stream) for _ in range(min(256, count - start))]
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            pixels = pictures_to_tensor([scenes.draw(s, rng) for s in batch], args.device)
            latents.append(vae.encode(pixels).latent_dist.mode().half().cpu())
        captions += [s.caption() for s in batch]
    return torch.cat(latents), captions


def sample(pipe: StableDiffusionPipeline, captions: list[str], seed: int = 0, batch: int = 64) -> list[np.ndarray]:
    pictures = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        seeds = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        out = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds, output_type="np").images
        pictures += [(255 * one).round().astype(np.uint8) for one in out]
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where stages are kept")
    parser.add_argument("-o", "--output", type=Path, default=None, help="folder for the finished pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128], help="channels of each UNet level")
    parser.add_argument("--layers", type=int, default=1, help="layers per UNet block")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"], default="epsilon")
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--pictures", type=int, default=60_000, help="training pictures drawn")
    parser.add_argument("--samples", type=int, default=320_000, help="training samples the UNet sees")
    parser.add_argument("--batch", type=int, default=64, help="over all processes")
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weights' moving average per step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORLD))
    mine = args.batch // WORLD

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.work / f"tokenizer-{RANK}")
    text = make_text_encoder(tokenizer).to(args.device)
    heads = nn.ModuleList(nn.Linear(128, n) for n in CLASSES).to(args.device)
    vae = make_autoencoder().to(args.device)
    unet = make_unet(args).to(args.device)
    rng = random.Random(1000 * args.seed + RANK)
    torch.manual_seed(1000 * args.seed + RANK)

    def tokens(captions: list[str]) -> Tensor:
        return tokenizer(
            captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).input_ids

    stream = scenes.scenes(args.seed + 1 + RANK, held_out=False)

    def text_loss(step: int) -> Tensor:
        batch = [next(stream) for _ in range(mine)]
        pooled = text(tokens([s.caption() for s in batch]).to(args.device)).pooler_output
        truth = torch.tensor([labels_of(s) for s in batch], device=args.device)
        return sum(F.cross_entropy(head(pooled).float(), truth[:, i]) for i, head in enumerate(heads)) / len(CLASSES)

    fit("text", {"text": text, "heads": heads}, text_loss, args.text_steps, 1e-3, args)

    def vae_loss(step: int) -> Tensor:
        pixels = pictures_to_tensor([scenes.draw(scenes.random_scene(rng), rng) for _ in range(mine // 2)], args.device)
        latent = vae.encode(pixels).latent_dist
        difference = vae.decode(latent.sample()).sample.float() - pixels
        return difference.abs().mean() + 2 * difference.square().mean() + 2e-5 * latent.kl().mean() / 16

    fit("vae", {"vae": vae}, vae_loss, args.vae_steps, 1e-3, args)

    cached = args.work / "latents.pt"
    if RANK == 0 and not cached.exists():
        latents, captions = encode_latents(vae, args.pictures, args)
        vae.register_to_config(scaling_factor=1 / latents.float().std().item())
        torch.save({"latents": latents, "tokens": tokens(captions), "scale": vae.config.scaling_factor}, cached)
        held = [scenes.draw(s, rng) for s in itertools.islice(scenes.scenes(7, held_out=True), 256)]
        with torch.no_grad():
            pixels = pictures_to_tensor(held, args.device)
            back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        say(f"vae: PSNR {10 * math.log10(4 / F.mse_loss(back, pixels).item()):.1f} dB on 256 held-out pictures")
    if WORLD > 1:
        torch.distributed.barrier()
    data = torch.load(cached, map_location=args.device, weights_only=True)
    vae.register_to_config(scaling_factor=data["scale"])
    latents, ids = data["latents"].float() * data["scale"], data["tokens"]
    empty = tokens([""]).to(args.device)
    scheduler = make_scheduler(args.prediction)
    alphas = scheduler.alphas_cumprod.to(args.device)

    def unet_loss(step: int) -> Tensor:
        at = torch.randint(len(latents), (mine,), device=args.device)
        clean, noise = latents[at], torch.randn(mine, *latents.shape[1:], device=args.device)
        dropped = torch.rand(mine, 1, device=args.device) < 0.1
        states = text(torch.where(dropped, empty, ids[at])).last_hidden_state
        # one timestep from each of `mine` equal slices of the schedule: the same law, less noise in the loss
        t = (
            len(alphas) * (torch.randperm(mine, device=args.device) + torch.rand(mine, device=args.device)) / mine
        ).long()
        noisy = scheduler.add_noise(clean, noise, t)
        target = noise if args.prediction == "epsilon" else scheduler.get_velocity(clean, noise, t)
        error = (unet(noisy, t, states).sample.float() - target).square().mean((1, 2, 3))
        # min-SNR weighting, gamma = 5 (arXiv 2303.09556), with a floor: at the noise levels where things find their
        # places, an error in the picture is next to no error in the noise
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(0.1, 5) / (snr if args.prediction == "epsilon" else snr + 1)
        return (weight * error).mean()

    averaged = {"unet": copy.deepcopy(unet).requires_grad_(False), "text": copy.deepcopy(text).requires_grad_(False)}

    def pipeline(half: bool) -> StableDiffusionPipeline:
        parts = {"vae": vae, "text_encoder": averaged["text"], "unet": averaged["unet"]}
        parts = {k: copy.deepcopy(m).to(torch.float16 if half else torch.float32).eval() for k, m in parts.items()}
        pipe = StableDiffusionPipeline(
            **parts, tokenizer=tokenizer, scheduler=make_scheduler(args.prediction), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def evaluate(count: int, sheet: Path) -> dict[str, float]:
        captions = scenes.captions(count, seed=11, held_out=True)
        pictures = sample(pipeline(half=False), captions)
        rows = [np.hstack(pictures[i : i + 12]) for i in range(0, 72, 12) if len(pictures) >= i + 12]
        Image.fromarray(np.vstack(rows)).resize((12 * 96, len(rows) * 96), Image.Resampling.NEAREST).save(sheet)
        return scenes.mean_scores(pictures, captions)

    def watch(step: int) -> None:
        if RANK == 0 and step % 1000 == 0:
            marks = evaluate(48, args.work / f"sheet-{step}.png")
            say("unet: " + " ".join(f"{k} {v:.3f}" for k, v in marks.items()))

    fit("unet", {"unet": unet, "text": text}, unet_loss, args.samples // args.batch, args.rate, args, averaged, watch)

    if RANK == 0 and args.output:
        marks = evaluate(256, args.work / "sheet.png")
        say("256 held-out captions: " + " ".join(f"{k} {v:.3f}" for k, v in marks.items()))
        pipe = pipeline(half=True)
        pipe.save_pretrained(args.output, safe_serialization=True)
        state = original_layout.clip(pipe.text_encoder)  # transformers 5 leaves out a prefix that 4 needs
        pipe.text_encoder.save_pretrained(args.output / "text_encoder", state_dict=state)
        for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads; 5 writes tokenizer.json alone
            shutil.copy(args.work / "tokenizer-0" / name, args.output / "tokenizer" / name)
        say(f"written to {args.output}")


if __name__ == "__main__":
    main()
