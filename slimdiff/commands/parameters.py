"""What the commands take, and how they fail: values from text, options that several share, errors as messages."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from slimdiff import outputs
from slimdiff.errors import SlimdiffError
from slimdiff.recipe import SIDE_STEP
from slimdiff.stacking import PACKAGES

PATH = click.Path(path_type=Path)
KINDS = ("qk", "vo", "ffn", "resnet")
METRIC_NAMES = ("clip", "fid", "lpips")
DTYPES = ("auto", "float32", "float16", "bfloat16")


LIGHTER = {
    "--batch-size": "a smaller --batch-size",
    "--batch-sizes": "smaller --batch-sizes",
    "--probe-prompts": "--probe-prompts 4; float16 weights, --variant fp16; smaller pictures when calibrating",
    "--height": "smaller pictures, --height and --width",
    "--device": "--device cpu",
}
"""What makes a command take less memory, by the option that says that it can."""


class Parsed(click.ParamType):
    """A value read by a function whose ValueError is what the user is told."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Whole(click.IntRange):
    """A whole number within bounds; what is none is called no integer, not "no integer range"."""

    name = "integer"


class Number(click.FloatRange):
    """Likewise."""

    name = "number"


def _pixels(text: str) -> int:
    if not (text.isdecimal() and int(text) and int(text) % SIDE_STEP == 0):
        raise ValueError(f"'{text}' is not a side that pictures can have: a multiple of {SIDE_STEP} pixels, as in 512.")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share < 1:
        raise ValueError(
            f"'{text}' is not a share to remove: at least 0 (which changes nothing) and below 1, as in 0.35."
        )
    return share


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(_share(part.strip()) for part in text.split(","))
    if twice := [share for share in shares if shares.count(share) > 1]:
        raise ValueError(f"{twice[0]:g} is there twice.")
    return shares


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in text.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"'{unknown[0]}' is not a kind of group; choose from {', '.join(KINDS)}.")
    return kinds


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in names if name not in METRIC_NAMES]:
        raise ValueError(f"'{unknown[0]}' is not a metric; choose from {', '.join(METRIC_NAMES)}.")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"'{text}' is not a list of batch sizes, as in 1,4.")
    return tuple(int(part) for part in text.split(","))


def _stacks(text: str) -> tuple[str, ...]:
    stacks = tuple(part.strip() for part in text.split(","))
    if unknown := [name for stack in stacks for name in stack.split("+") if name not in PACKAGES]:
        raise ValueError(
            f"'{unknown[0]}' cannot be put on top; choose from {', '.join(PACKAGES)}, several at once as in int8+tome."
        )
    return stacks


def _lora(text: str) -> tuple[str, float]:
    file, _, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"'{text}' is not a part: the first of 16 is 1/16, the last 16/16.")
    return int(part), int(parts)


SHARES, GROUPS, SIZES = Parsed("shares", _shares), Parsed("kinds", _kinds), Parsed("sizes", _sizes)
PIXELS = Parsed("pixels", _pixels)
METRICS, STACKS = Parsed("metrics", _metrics), Parsed("stacks", _stacks)
LORA, SHARD = Parsed("file[:scale]", _lora), Parsed("part/parts", _shard)


def say(text: str) -> None:
    """To people, not to pipes: what is worth knowing beside the outcome."""
    click.echo(text, err=True)


def newest_slim() -> Path:
    """The slim checkpoint for a command that was given none; which one it is, is said."""
    found = outputs.newest_slim()
    say(f"slim checkpoint: {found}")
    return found


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a SlimdiffError into its text and exit code 1, and being out of GPU memory into advice."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        for chatty in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao wherever it is installed
            logging.getLogger(chatty).setLevel(logging.ERROR)
        try:
            function(*args, **kwargs)
        except SlimdiffError as error:
            failure: Any = click.ClickException(str(error))
            failure.exit_code = error.exit_code
            raise failure from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            taken = {name for option in click.get_current_context().command.params for name in option.opts}
            ways = [way for name, way in LIGHTER.items() if name in taken]
            raise click.ClickException(f"The GPU is out of memory. What helps: {'; '.join(ways)}.") from error

    return run


def model_options(
    command: Callable[..., None], dtype: str = "Dtype to run in; auto is float16 on CUDA, float32 on the CPU."
) -> Callable[..., None]:
    """What every command that runs a model takes; `dtype` is the help of that option."""
    for option in (
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="auto", help=dtype),
        click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto prefers CUDA."),
        click.option("--variant", help="Variant of the dense model's weights, such as fp16."),
    ):  # fmt: skip
        command = option(command)
    return command


def size_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every command takes that depends on the size of pictures; without them the model's own counts."""
    command = click.option("--width", type=PIXELS, help=f"Width of pictures, a multiple of {SIDE_STEP}.")(command)
    return click.option("--height", type=PIXELS, help=f"Height of pictures, a multiple of {SIDE_STEP}.")(command)


def picture_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every command that paints pictures takes; without them the model family's own values count."""
    command = size_options(command)
    for option in (
        click.option("--guidance-scale", type=float, help="Classifier-free guidance scale."),
        click.option("--steps", type=Whole(1), help="Denoising steps of each picture."),
        click.option("--num-prompts", type=Whole(1), help="Use the first N prompts only."),
        click.option("--column", default="prompt", help="Prompt column of a .csv, .tsv or .jsonl file."),
        click.option("--prompts", type=PATH, help="Prompt file: .txt (one a line), .csv, .tsv or .jsonl."),
    ):
        command = option(command)
    return command
