"""The metrics on stand-in weights: the networks are those of torchmetrics, figures follow definitions."""

from __future__ import annotations

import math
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stand_in
from PIL import Image
from scipy import linalg
from transformers import CLIPModel, CLIPProcessor

from slimdiff.errors import SlimdiffError
from slimdiff.metrics import choice, inception, lpips, weights
from slimdiff.metrics.clip import ClipMetric
from slimdiff.metrics.fid import FidMetric
from slimdiff.metrics.lpips import LpipsMetric
from slimdiff.metrics.pictures import Pictures
from slimdiff.metrics.score import Estimate, Score

CPU = torch.device("cpu")
PROMPTS = ("a red cat", "owl", "two bees and a very long sentence that no tiny text model can take in", "fox", "sea")
SIZE = (48, 40)


def noise(*shape: int, seed: int) -> torch.Tensor:
    """8-bit pictures of nothing."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def painted(folder: Path, seed: int, count: int = 5, size: tuple[int, int] = SIZE, batch: int = 2) -> Pictures:
    folder.mkdir(parents=True)
    pixels = noise(count, size[1], size[0], 3, seed=seed).numpy()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return Pictures(tuple(folder / f"{i}.png" for i in range(count)), size, batch)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Pictures, Pictures]:
    return painted(tmp_path / "dense", 1), painted(tmp_path / "slim", 2)


@pytest.mark.parametrize(
    ("width", "first", "mean"),
    [(64, (0.172853, 0.002178, 0.118712), 0.324020), (192, (0.861915, 0.609121, 0.207772), 0.346508),
     (768, (0.0, 0.119216, 0.011803), 0.071646), (2048, (0.011005, 0.0, 0.034867), 0.059105)],
)  # fmt: skip
@torch.no_grad()
def test_inception_is_the_network_of_torch_fidelity(width, first, mean):
    """The figures are of torchmetrics 1.9.0 with torch-fidelity 0.4.0 on the same weights and pictures."""
    network = inception.Inception(width)
    weights.fill(network, stand_in(inception.Inception()), "stand-in")
    found = network(noise(2, 3, 64, 48, seed=1))
    assert found.shape == (2, width) and found.mean().item() == pytest.approx(mean, rel=1e-4)
    assert found[0, :3].tolist() == pytest.approx(first, abs=1e-5)


@torch.no_grad()
def test_lpips_is_that_of_torchmetrics(metric_weights):
    """The figures are of torchmetrics 1.9.0, whose linear layers both have, on the same AlexNet and pictures."""
    generator = torch.Generator().manual_seed(1)
    _, a, b = (
        torch.randint(0, 256, (n, 3, 64, 48), dtype=torch.uint8, generator=generator) for n in (2, 3, 3)
    )  # as they were made there, after two other pictures
    network = LpipsMetric(metric_weights).network
    assert network(a, b).tolist() == pytest.approx([0.0985135, 0.1020814, 0.0999157], abs=1e-6)
    assert network(a, a).tolist() == [0, 0, 0]
    assert network(noise(1, 3, lpips.LEAST, lpips.LEAST, seed=1), noise(1, 3, 31, 31, seed=2)).item() > 0
    with pytest.raises(SlimdiffError, match="at least 31 px, not 48 x 30"):
        LpipsMetric(metric_weights).check(1, (48, 30))


def test_lpips_grows_with_the_change(metric_weights, tmp_path):
    picture = np.tile(np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None], (48, 1, 3))
    found = []
    for amount in (0, 8, 60):
        rough = np.random.default_rng(0).integers(-amount, amount + 1, picture.shape)
        Image.fromarray((picture + rough).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{amount}.png")
        pair = [Pictures((tmp_path / f"{n}.png",), (48, 48), 2) for n in (0, amount)]
        found.append(LpipsMetric(metric_weights).measure(*pair, ["x"], CPU).slim)
    assert found[0].value == 0 < found[1].value < found[2].value and found[1].error is None


def test_clip_score_is_the_cosine_of_each_picture_and_its_own_prompt(clip_folder, sides):
    """Pictures one by one, without padding: batches and their remainder change nothing."""
    network, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    expected = []
    for path, prompt in zip(sides[1].paths, PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=[Image.open(path)], return_tensors="pt", truncation=True, max_length=8)
        with torch.no_grad():
            expected.append((100 * network(**inputs).logits_per_image / network.logit_scale.exp()).item())
    score = ClipMetric(str(clip_folder)).measure(*sides, PROMPTS, CPU)
    assert score.slim.value == pytest.approx(np.mean(expected), abs=1e-3)
    assert score.slim.error == pytest.approx(np.std(expected, ddof=1) / math.sqrt(5), abs=1e-3)
    assert score.difference.value == pytest.approx(score.slim.value - score.dense.value)
    assert str(clip_folder) in score.meaning


def test_differences_are_paired():
    dense = torch.tensor([1.0, 5.0, 9.0])
    score = Score.paired("x", "", dense, dense + torch.tensor([0.0, 0.1, 0.2]))
    assert score.difference == Estimate(pytest.approx(0.1), pytest.approx(0.1 / math.sqrt(3)))
    assert score.slim.error > 20 * score.difference.error


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Dowson & Landau 1982; tr (A B)^1/2 is the nuclear norm of the product of the deviations, rows of A and B."""
    x, y = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (a, b))
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return float(means + np.square(x).sum() + np.square(y).sum() - 2 * linalg.svdvals(x @ y.T).sum())


@torch.no_grad()
def test_fid_is_the_distance_of_two_normal_distributions(metric_weights, tmp_path):
    dense, slim = painted(tmp_path / "dense", 1), painted(tmp_path / "slim", 2)
    for path in slim.paths:
        Image.open(path).point(lambda value: value // 2).save(path)
    real = painted(tmp_path / "real" / "inner", 3, 6, size=(80, 60))
    network = inception.load(64, metric_weights)

    def features(pictures: Pictures) -> np.ndarray:
        return torch.cat([network(batch) for batch in pictures.batches("")]).double().numpy()

    apart = FidMetric(metric_weights, 64, None).measure(dense, slim, (), CPU)
    assert (
        apart.slim.value == pytest.approx(frechet(features(dense), features(slim)), rel=1e-3) and apart.slim.value > 1
    )
    assert apart.dense is apart.difference is None and "DENSE" in apart.meaning and "64 features" in apart.meaning

    metric = FidMetric(metric_weights, 64, tmp_path / "real")
    score, again = (metric.measure(dense, slim, (), CPU) for _ in range(2))
    of_real = features(Pictures(real.paths, SIZE, 7))
    assert score == again and "6 real pictures" in score.meaning
    assert score.dense.value == pytest.approx(frechet(of_real, features(dense)), rel=1e-3)
    assert score.slim.value == pytest.approx(frechet(of_real, features(slim)), rel=1e-3)
    assert score.difference.value == pytest.approx(score.slim.value - score.dense.value)


def test_fid_of_a_set_to_itself_is_nothing_and_says_when_pictures_are_few(metric_weights, sides):
    score = FidMetric(metric_weights, 64, None).measure(sides[0], sides[0], (), CPU)
    assert score.slim.value == pytest.approx(0, abs=1e-4) and score.slim.value >= 0
    assert "5 pictures do not even span its 64 dimensions" in score.cautions[0]
    with pytest.raises(SlimdiffError, match="more than one prompt"):
        FidMetric(metric_weights, 64, None).check(1, SIZE)


def test_pictures_are_cut_at_the_centre_and_resized(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle third
    Image.fromarray(wide).save(tmp_path / "wide.jpg", quality=95)
    Image.fromarray(wide[:, 20:40]).convert("L").save(tmp_path / "grey.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = Pictures.under(tmp_path, (10, 10), 4)
    assert [path.name for path in found.paths] == ["grey.png", "wide.jpg"]
    [batch] = found.batches("")
    assert batch.shape == (2, 3, 10, 10) and batch.dtype == torch.uint8 and (batch > 220).all()


def test_a_reference_without_pictures_is_refused(metric_weights, tmp_path):
    with pytest.raises(SlimdiffError, match="holds 0 pictures"):
        FidMetric(metric_weights, 64, tmp_path).check(5, SIZE)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"torn")
    with pytest.raises(SlimdiffError, match=r"a\.png cannot be read as a picture"):
        list(Pictures.under(tmp_path, SIZE, 2).batches(""))


def offline(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("no network")


def test_what_cannot_be_downloaded_is_said_at_once(monkeypatch, clip_folder, metric_weights, tmp_path):
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SlimdiffError) as caught:
        choice.load(("fid", "clip", "lpips"), clip_model=str(clip_folder), weights=tmp_path)
    said = str(caught.value)
    for url in (inception.URL, lpips.URL):
        assert f"{url} cannot be downloaded" in said and f"put it at {tmp_path / url.rpartition('/')[2]}." in said
    assert "no network" in said and said.endswith("What can be measured is --metrics clip.")

    # Put there, it is read from there.
    loaded = choice.load(("fid", "lpips"), weights=metric_weights, fid_features=64)
    assert [type(metric) for metric in loaded] == [FidMetric, LpipsMetric]


def test_weights_are_kept_where_torch_keeps_them(monkeypatch, metric_weights, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "checkpoints").symlink_to(metric_weights, target_is_directory=True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert inception.load(64, None).num_features == 64


def test_a_clip_model_that_is_not_there(tmp_path):
    with pytest.raises(SlimdiffError, match=r"clip: .*cannot be loaded .*--clip-model"):
        choice.load(["clip"], clip_model=str(tmp_path))
    with pytest.raises(SlimdiffError, match="'inception' is not a metric; choose from clip, fid, lpips"):
        choice.load(["inception"])


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code was run",)


def test_a_weight_file_runs_no_code_and_has_to_fit(tmp_path, capsys):
    file = tmp_path / inception.URL.rpartition("/")[2]
    torch.save({"Conv2d_1a_3x3.conv.weight": Malicious()}, file)
    with pytest.raises(SlimdiffError, match="does not hold plain weights"):
        inception.load(64, tmp_path)
    assert "code was run" not in capsys.readouterr().out
    state = stand_in(inception.Inception(64))
    torch.save(state | {"Conv2d_2b_3x3.bn.bias": torch.zeros(3)}, file)
    with pytest.raises(SlimdiffError, match=r"\(3,\) for Conv2d_2b_3x3.bn.bias, not \(64,\)"):
        inception.load(64, tmp_path)
    torch.save({name: x for name, x in state.items() if "1a" not in name}, file)
    with pytest.raises(SlimdiffError, match=r"nothing for Conv2d_1a_3x3.conv.weight"):
        inception.load(64, tmp_path)


def test_without_torchmetrics_the_message_says_what_to_install(monkeypatch, metric_weights, clip_folder):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    for name in ("fid", "lpips"):
        with pytest.raises(SlimdiffError, match=rf"{name}: It needs torchmetrics.*pip install 'slimdiff\[eval\]'"):
            choice.load([name], weights=metric_weights)
    assert choice.load(["clip"], clip_model=str(clip_folder))
