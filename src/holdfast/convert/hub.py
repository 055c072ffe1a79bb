"""Upload of an export to the Hugging Face hub, with a model card that states its origin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from holdfast.catalog.hf_folder import is_of_diffusers
from holdfast.convert.plan import ConvertPlan
from holdfast.convert.source import HUB_NAME, hub_name
from holdfast.errors import StorageError, UsageError
from holdfast.format.safetensors import INDEX_SUFFIX, SUFFIX
from holdfast.release import installed_version
from holdfast.spelling import counted

T = TypeVar("T")

CARD = "README.md"

_HEADER = re.compile(rb"---\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^license(?:_name|_link)?: *\S.*$", re.MULTILINE)

_SOURCE_PARTS = 3
"""Number of last parts of the source path that a card shows. Folders above them may contain names
of people."""


def open_repository(name: str) -> None:
    """Create the private repository `name` on the hub, unless it exists.

    Call this before a conversion, so that a missing token is noticed before hours of work.

    Raises:
        UsageError: `name` is not `org/name`, or huggingface_hub is not installed.
        StorageError: the hub refuses the request or cannot be reached.
    """
    if not HUB_NAME.fullmatch(name):
        raise UsageError(
            f"`--push-to-hub` must be the `org/name` of a repository, found: {name}",
            hint="use your own name on the hub as `org`",
        )
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UsageError(
            "`--push-to-hub` needs `huggingface_hub`", hint="pip install 'holdfast[hf]'"
        ) from error
    _on_hub(name, lambda: HfApi().create_repo(name, private=True, exist_ok=True), None)


def upload(folder: str, name: str) -> str:
    """Upload a complete export to the repository `name`. Returns the URL of the commit.

    Weight files of an earlier upload are deleted if the export does not have them. Files that the
    hub already has are not sent again.

    Raises:
        StorageError: the upload failed; the folder is complete.
    """
    from huggingface_hub import HfApi

    def send() -> str:
        commit = HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Upload weights with Holdfast {installed_version()}",
            delete_patterns=[f"*{SUFFIX}", f"*{INDEX_SUFFIX}"],
        )
        return str(commit.commit_url)

    return _on_hub(name, send, again_hint(folder, name))


def again_hint(folder: str, name: str) -> str:
    """Return the hint on how to complete an upload that failed."""
    return f"`{folder}` is complete: `hf upload {name} {folder}` sends the rest"


def _on_hub(name: str, action: Callable[[], T], hint: str | None) -> T:
    """Run an action on the hub and return its result. If it fails, raise a StorageError with one
    line. `name`: name of the repository. `hint`: hint of the error."""
    from huggingface_hub import errors

    # Before version 1, huggingface_hub raises exceptions of `requests`, which are OSErrors. Since
    # version 1, it raises those of `httpx`.
    http_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        return action()
    except (OSError, ValueError, RuntimeError, http_error) as raised:
        # If the upload of a single file fails, the error is wrapped in a RuntimeError.
        error = raised.__cause__ or raised if isinstance(raised, RuntimeError) else raised
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            reason = "no token" if status == 401 else "its token may not write there"
            reason = f"the hub refuses it, with status {status}: {reason}"
            login = "`hf auth login`, or set HF_TOKEN, with a token that may write"
            hint = login if hint is None else f"{login}; then {hint}"
        raise StorageError(
            f"`{name}` on the Hugging Face hub cannot be written: {reason}", hint=hint
        ) from raised


def with_card(
    contents: Iterable[tuple[str, bytes]], planned: ConvertPlan, dtype: str
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of an export besides its weights, with a new model card.

    `contents`: name and bytes of each of these files. `dtype`: dtype of the weights. The new card
    replaces the card in `contents`, which describes other weights, but keeps its license.
    """
    replaced, last = b"", list[tuple[str, bytes]]()
    for file, data in contents:
        if file == CARD:
            replaced = data
        elif file.endswith(INDEX_SUFFIX):
            last.append((file, data))
        else:
            yield file, data
    yield CARD, card(planned, dtype, replaced).encode()
    yield from last


def card(planned: ConvertPlan, dtype: str, replaced: bytes = b"") -> str:
    """Return the model card of an export in `dtype`. `replaced`: model card of the base model."""
    manifest = planned.opened.checkpoint.manifest
    base = _base_name(planned)
    source = planned.opened.given
    if hub_name(source) is None:
        source = "/".join(re.split(r"[/\\]+", source.rstrip("/\\"))[-_SOURCE_PARTS:])
    num_elements = sum(
        output.num_elements for output in planned.outputs.values() if not output.same_as
    )
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    rows = {
        "converted from": f"`{source}`",
        "step": "" if manifest.step is None else f"{manifest.step}",
        "saved at": manifest.created,
        "saved by": versions,
        "base model": "" if base is None else f"[{base}](https://huggingface.co/{base})",
        "weights": f"{counted(num_elements, 'element')}, {dtype}",
        "converted by": f"[Holdfast](https://pypi.org/project/holdfast/) {installed_version()}",
    }
    header = _LICENSE.findall(_header_of(replaced))
    header += [] if base is None else [f"base_model: {base}"]
    header += [f"library_name: {_library(planned)}"]
    header += ["tags:", "- holdfast"]
    table = [f"| {key} | {value} |" for key, value in rows.items() if value]
    lines = ["---", *header, "---", "", f"# {_title(planned)}", "", "| | |", "|---|---|", *table]
    return "\n".join(lines) + "\n"


def _library(planned: ConvertPlan) -> str:
    """Return the name on the hub of the library that opens the export."""
    if planned.adapter is not None:
        return "peft"
    return "diffusers" if is_of_diffusers(planned.config or {}) else "transformers"


def _title(planned: ConvertPlan) -> str:
    return (planned.options.push_to_hub or "").rpartition("/")[2]


def _base_name(planned: ConvertPlan) -> str | None:
    """Return the name of the base model on the hub; None if unknown."""
    names = [planned.options.hf_assets, planned.opened.given]
    if planned.adapter is not None:
        names.insert(0, planned.adapter.get("base_model_name_or_path"))
    return next((name for name in names if isinstance(name, str) and hub_name(name)), None)


def _header_of(text: bytes) -> str:
    """Return the metadata at the beginning of a model card; empty if it has none."""
    match = _HEADER.match(text)
    return match[1].decode(errors="replace") if match else ""
