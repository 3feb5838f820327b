"""Find out what a name means before transformers is asked: a folder, a hub id, or nothing.

transformers asks an unreachable hub for file after file, several times each, and explains a typing
error in a paragraph. Here it is one question and one sentence.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from fastguide.assets import resolve
from fastguide.models.guide_config import CONFIG_FILE as GUIDE_FILE

MODEL_FILE = "config.json"


def locate(path: str | Path, file: str = MODEL_FILE, what: str = "model") -> str:
    """Where a model or guide is: its folder, or its hub id.

    Args:
        path: hub id, local path or packaged name.
        file: what marks its folder or repository.
        what: ``model`` or ``guide``, for the message.

    Raises:
        ValueError: where there is neither a folder nor a repository, or it does not hold ``file``.
    """
    if not holds(path, file, what):
        guide = what == "model" and holds(path, GUIDE_FILE, what)
        raise _absent(path, what, "it is a guide" if guide else f"the file {file} is missing")
    return resolve(path)


def holds(path: str | Path, file: str, what: str) -> bool:
    """Whether a folder or hub repository holds a file; small files of the hub are fetched.

    Args:
        path: hub id, local path or packaged name.
        file: name of the file.
        what: ``model`` or ``guide``, for the message.

    Raises:
        ValueError: where there is no such folder or repository, or the hub cannot be asked.
    """
    folder = Path(resolve(path))
    if folder.is_dir():
        return (folder / file).is_file()
    if folder.exists():
        raise _absent(path, what, "it is a file, allowed are folders and hub ids")
    repository, also = str(path), "there is no such folder, and"
    try:
        cached = try_to_load_from_cache(repository, file)
        if cached is not None:
            return isinstance(cached, str)
        # This asks once; the download would try an unreachable hub again and again.
        get_hf_file_metadata(hf_hub_url(repository, file))
        hf_hub_download(repository, file)
    except HFValidationError as error:
        raise _absent(path, what, "there is no such folder") from error
    except GatedRepoError as error:
        raise _absent(path, what, f"{also} the hub's repository wants a token") from error
    except RepositoryNotFoundError as error:
        raise _absent(path, what, f"{also} the hub has no such repository") from error
    except LocalEntryNotFoundError as error:
        raise _absent(path, what, f"{also} the hub cannot be reached") from error
    except EntryNotFoundError:
        return False
    except HfHubHTTPError:
        return True  # the hub has trouble of its own: whoever loads the file tries longer
    except Exception as error:
        raise _absent(path, what, f"{also} the hub cannot be reached") from error
    return True


def _absent(path: str | Path, what: str, reason: str) -> ValueError:
    return ValueError(f"no {what} at {str(path)!r}: {reason}")
