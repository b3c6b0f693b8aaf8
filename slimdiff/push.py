"""`slimdiff push`: a slim checkpoint on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from slimdiff.card import card
from slimdiff.checkpoint import read_plan
from slimdiff.errors import SlimdiffError
from slimdiff.outputs import PLAN, report_path
from slimdiff.plan import Plan
from slimdiff.report import comparison, sheet

CARD = "README.md"
PICTURES = (PLAN.parent / sheet.FILE).as_posix()


@dataclass(frozen=True)
class Package:
    """What goes to `repo`: files by their path there, each a local file or its content."""

    repo: str
    files: dict[str, Path | bytes]

    @property
    def card(self) -> str:
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in self.files.items()}


def package(slim: Path, repo: str, report: Path | None = None, licence: str | None = None) -> Package:
    """A slim checkpoint as it is to be published: its files, a model card, and the plan without local paths.

    The card has the figures and pictures of `report`, a report of `slimdiff bench`, by default of the one beside the
    checkpoint if that is of the same plan. `licence` is an identifier of the hub's.

    Raises SlimdiffError if `repo` is no name, or `report` is none or of another plan, ModelError if `slim` is no slim
    checkpoint.
    """
    _check_name(repo)
    text = read_plan(slim)
    plan = Plan.from_json(text, slim / PLAN)
    config = json.loads((slim / "unet" / "config.json").read_text(encoding="utf-8"))
    model = plan.provenance["model"]
    base = model if model.count("/") == 1 and not Path(model).exists() else None
    figures, pictures = _measured(slim, report, json.loads(text))
    page = card(config, repo, plan.summary(), base, licence, figures, PICTURES if pictures else None)
    names = {path.relative_to(slim): path for path in sorted(slim.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {
        name.as_posix(): path for name, path in names.items() if not any(part.startswith(".") for part in name.parts)
    }
    files |= {CARD: page.encode(), PLAN.as_posix(): _without_paths(plan).to_json().encode()}
    files |= {PICTURES: pictures} if pictures else {}
    return Package(repo, files)


def upload(
    package: Package,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Create the repository if need be, put all files there in one commit, and return the commit's address.

    `revision` is a branch, made if need be. `token` is by default the one that 'hf auth login' or HF_TOKEN left,
    `endpoint` the public hub.

    Raises SlimdiffError if there is no token, it may not write there, or the hub cannot be reached.
    """
    if token is None and get_token() is None:
        raise SlimdiffError("There is no token for the hub. Log in with 'hf auth login', or set HF_TOKEN.")
    api = HfApi(endpoint=endpoint, token=token)
    operations = [CommitOperationAdd(name, content) for name, content in package.files.items()]
    try:
        api.create_repo(package.repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(package.repo, branch=revision, exist_ok=True)
        done = api.create_commit(package.repo, operations, commit_message="Slim checkpoint", revision=revision)
    except Exception as error:  # the hub's own errors, or those of the client it uses, which differ by version
        raise SlimdiffError(_advice(error, package.repo)) from error
    return str(done.commit_url)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SlimdiffError(f"'{repo}' is no name on the hub ({error}); it looks like owner/name.") from error
    if "/" not in repo:
        raise SlimdiffError(f"'{repo}' has no owner; a name on the hub looks like owner/name.")


def _measured(slim: Path, report: Path | None, plan: dict[str, Any]) -> tuple[dict[str, Any] | None, Path | None]:
    """The JSON of a report and its sheet of pictures, each None where there is none."""
    path = report or report_path(slim.resolve())
    if report is None and not (path / comparison.REPORT).is_file():
        return None, None
    [run] = comparison.read([path])
    if run.plan != plan:
        if report is None:
            return None, None
        raise SlimdiffError(f"{report} is a report of another slim checkpoint. Run 'slimdiff bench {slim}' anew.")
    pictures = (path if path.is_dir() else path.parent) / sheet.FILE
    return run.data, pictures if pictures.is_file() else None


def _without_paths(plan: Plan) -> Plan:
    """Names in the place of the paths of local files, which are nobody's business and lead nowhere elsewhere."""
    made = plan.provenance
    options = {key: _name(value) for key, value in made.get("model_options", {}).items()}
    loras = [(_name(file), scale) for file, scale in made.get("loras", ())]
    return replace(plan, provenance=made | {"model": _name(made["model"]), "model_options": options, "loras": loras})


def _name(reference: str) -> str:
    return Path(reference).name if Path(reference).is_absolute() else reference


def _advice(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if status == 401:
        return f"The hub does not know the token ({said}). Log in anew with 'hf auth login', or set HF_TOKEN."
    if status in (403, 404):
        return f"The token may not write to {repo} ({said}). Use one with write access, or a repository of your own."
    if status is not None:
        return f"The hub refused the upload to {repo}: {said}"
    return f"The hub cannot be reached ({type(error).__name__}: {said}). Check the network; no file was published."
