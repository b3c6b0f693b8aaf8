"""Publishing: the model card, and what a hub is sent. The hub here is a thread of this process."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from huggingface_hub import constants

import slimdiff
from slimdiff import checkpoint, push, timing
from slimdiff.cli import main
from slimdiff.errors import ModelError, SlimdiffError
from slimdiff.plan import Plan
from slimdiff.report import page

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does to what an upload asks; `refusing` is a status it answers instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, Any, str | None]] = []
        self.refusing: int | None = None

    def sent(self, path: str) -> Any:
        [body] = [body for asked, body, _ in self.asked if asked == path]
        return body


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.server.asked.append((self.path, lines, self.headers["authorization"]))
        files = lines[0].get("files", []) if lines else []
        self.answer({
            "url": f"{self.server.address}/someone/slim", "commitUrl": f"{self.server.address}/someone/slim/commit/1",
            "commitOid": "1", "success": True, "errors": [], "warnings": [],
            "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files],
        })  # fmt: skip

    def answer(self, content: dict[str, Any]) -> None:
        text = json.dumps({"error": "no"} if self.server.refusing else content).encode()
        self.send_response(self.server.refusing or 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory) -> Path:
    """A slim checkpoint, and beside it the report of its benchmark."""
    folder = tmp_path_factory.mktemp("push")
    pipe = DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    size = {"steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    statistics = slimdiff.calibrate(pipe, ["cat", "hill", "owl"], folder / "s.safetensors", **size)
    slim = slimdiff.compress(pipe, statistics, influence="local")
    slimdiff.save(slim, folder / "slim-0.35")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SHORTEST", 0.001)
        report = slimdiff.bench(pipe, slim, ["cat", "fox"], batch_sizes=[1], repeats=2)
    page.write(report, folder / "bench-0.35")
    return folder / "slim-0.35"


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return result.output


def test_every_file_is_sent_in_one_commit(made, hub):
    out = run("push", made, "someone/slim", "--private")
    assert out.splitlines()[-1] == f"{hub.address}/someone/slim/commit/1" and TOKEN not in out
    [create] = hub.sent("/api/repos/create")
    assert (create["name"], create["organization"]) == ("slim", "someone")
    assert create.get("private") or create.get("visibility") == "private"
    _, *operations = hub.sent("/api/models/someone/slim/commit/main")
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in operations}
    there = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert sent.pop("slimdiff/pictures.png") == (made.parent / "bench-0.35/pictures.png").read_bytes()
    assert sent.keys() == there.keys()
    assert {name for name in sent if sent[name] != there[name]} == {"README.md", "slimdiff/plan.json"}
    assert all(token == f"Bearer {TOKEN}" for _, _, token in hub.asked)


def test_what_is_published_names_no_local_path(made, model_folder):
    files = push.package(made, "someone/slim").files
    assert str(model_folder) in checkpoint.read_plan(made)
    plan = Plan.from_json(files["slimdiff/plan.json"].decode())
    assert plan.provenance["model"] == model_folder.name
    assert str(model_folder.parent) not in files["README.md"].decode()
    own = Plan.from_json(checkpoint.read_plan(made))
    assert replace(plan, provenance={}) == replace(own, provenance={})


def test_the_card_says_what_was_measured_and_how_to_load(made):
    card = push.package(made, "someone/slim", licence="openrail++").card
    report = json.loads((made.parent / "bench-0.35/report.json").read_text())
    assert front_matter(card) == {
        "library_name": "diffusers", "license": "openrail++", "pipeline_tag": "text-to-image",
        "tags": ["slimdiff", "stable-diffusion", "compressed"],
    }  # fmt: skip
    assert 'from_pretrained("someone/slim"' in card and "A1111" in card
    for row in report["speed"]:
        assert f"| {row['what']} |" in card and f"{row['speedup']['median']:.2f}x" in card
    assert "Drift" in card and report["provenance"]["device"] in card
    assert "(slimdiff/pictures.png)" in card
    assert card.count("LoRAs trained on the original work here") == 1


def test_the_card_names_a_base_model_of_the_hub_only(made, tmp_path):
    plan = Plan.from_json(checkpoint.read_plan(made))
    assert "base_model" not in push.package(made, "someone/slim").card
    public = replace(plan, provenance=plan.provenance | {"model": "owner/dense"})
    pipe = slimdiff.load(made)
    checkpoint.write(tmp_path / "slim", pipe.unet, pipe, public.to_json(), None)
    package = push.package(tmp_path / "slim", "someone/slim")
    assert front_matter(package.card)["base_model"] == "owner/dense"
    assert "## Measured" not in package.card and ".png" not in package.card
    assert not any(name.endswith(".png") for name in package.files)
    with pytest.raises(SlimdiffError, match="another slim checkpoint"):
        push.package(tmp_path / "slim", "someone/slim", made.parent / "bench-0.35")


def test_a_dry_run_shows_all_and_sends_nothing(made, hub):
    out = run("push", made, "someone/slim", "--dry-run")
    assert hub.asked == [] and "# slim" in out
    for path in made.rglob("*"):
        assert path.is_dir() or f"  {path.relative_to(made).as_posix()}\n" in out


def test_a_revision_is_a_branch(made, hub):
    run("push", made, "someone/slim", "--revision", "half")
    asked = [path for path, _, _ in hub.asked]
    assert "/api/models/someone/slim/branch/half" in asked and "/api/models/someone/slim/commit/half" in asked


@pytest.mark.parametrize(("status", "says"), [(401, "does not know the token"), (403, "may not write to someone/slim")])
def test_refusals_of_the_hub(made, hub, status, says):
    hub.refusing = status
    out = run("push", made, "someone/slim", code=1)
    assert says in out and TOKEN not in out


def test_no_token_no_network_no_name(made, hub, monkeypatch):
    assert "looks like owner/name" in run("push", made, "slim", code=1)
    assert "looks like owner/name" in run("push", made, "a b/c d", code=1)
    with pytest.raises(SlimdiffError, match="cannot be reached"):
        push.upload(push.package(made, "someone/slim"), endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert "hf auth login" in run("push", made, "someone/slim", code=1)
    assert hub.asked == []


def test_only_slim_checkpoints_are_published(model_folder):
    with pytest.raises(ModelError, match="not a slim checkpoint"):
        push.package(model_folder, "someone/slim")
