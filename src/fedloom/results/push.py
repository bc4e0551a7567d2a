"""Upload a written folder to the hub: a private repository, which its owner may make public there."""

from __future__ import annotations

import re
from pathlib import Path

from fedloom.errors import RunError, SettingsError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> None:
    """Reject what is no name of a repository, before anything is written.

    Raises:
        SettingsError: it is not of the form owner/name.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(f"--push: expected OWNER/NAME on the hub, got {name!r}; name a repository")


def push(folder: Path, name: str) -> str:
    """Upload a folder's files in one commit and return the repository's address.

    A repository that is not there is made, private: an adapter tells something of the rows it was trained on. One that
    is there keeps its other files and its visibility. The token is that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        RunError: the hub refuses or cannot be reached; the folder stays as it is.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        place = api.create_repo(name, private=True, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add what fedloom wrote")
    except (HfHubHTTPError, LocalTokenNotFoundError, HTTPError, OSError) as error:
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunError(
            f"--push {name}: expected the hub to take {folder}, got {told}; check the token (hf auth login), then "
            f"use: hf upload {name} {folder}"
        ) from error
    return str(place)
