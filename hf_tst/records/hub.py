"""The Hub: access is validated before training, and errors become one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TSTError


class HubError(TSTError):
    """The Hub refused, or could not be reached. Nothing on this machine is lost."""


@contextmanager
def explained_hub_errors(doing: str, kept: str) -> Iterator[None]:
    """Context that turns the errors of the Hub's client into one sentence.

    Args:
        doing (`str`): The action, such as `"Pushing to someone/model"`.
        kept (`str`): Where the files to push are kept.

    Raises:
        HubError: If the Hub refused, failed or did not answer.
    """
    from huggingface_hub import errors

    try:
        yield
    except HubError:
        raise
    except (errors.HTTPError, OSError) as error:  # the base of the client's errors, and broken connections
        status = getattr(getattr(error, "response", None), "status_code", None)
        reasons = {
            401: "the token is wrong or missing (401): log in with `hf auth login`, or set HF_TOKEN",
            403: "the token may not write there (403): set hub_model_id to one of your repositories, or use a token with write access",
            404: "there is no such repository or branch (404): check hub_model_id and hub_revision",
        }
        answer = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reasons.get(status or 0, f"{answer}: try again later with trainer.push_to_hub()")
        raise HubError(f"{doing} failed: {reason}. {kept}") from error


def check_repo_holds_no_other_model(
    repo_id: str, config: Any, token: str | None, revision: str | None
) -> None:
    """Check that `repo_id` does not hold a different model than one with `config`.

    A missing branch is created from `main`: otherwise the push would fail after training.

    Args:
        repo_id (`str`): An existing repository.
        config (`PretrainedConfig`): Of the model to push.
        token (`str`, *optional*), revision (`str`, *optional*): As for the push.

    Raises:
        HubError: If the repository holds a model of another type or size.
    """
    from huggingface_hub import create_branch, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        path = hf_hub_download(repo_id, "config.json", token=token, revision=revision, force_download=True)
    except RevisionNotFoundError:
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        return
    except EntryNotFoundError:
        return
    found, ours = json.loads(Path(path).read_text(encoding="utf-8")), config.to_dict()
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    differences = [
        f"{name} {found[name]} there, {ours[name]} here"
        for name in names
        if name in found and name in ours and found[name] != ours[name]
    ]
    if differences:
        raise HubError(
            f"{repo_id} already holds a different model ({'; '.join(differences)}): set another hub_model_id or hub_revision."
        )
