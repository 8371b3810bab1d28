"""Network files by Hub id: ``owner/name``, or ``owner/name/file.safetensors`` where the repository has several."""

import logging
import re
from pathlib import Path
from typing import Any

from diffit.errors import UserError

logger = logging.getLogger(__name__)

NOTICE = (
    "weights from the Hub keep their authors' licence; NVIDIA's official DiffiT weights are for "
    "non-commercial use only (see the model card)"
)


def looks_like_id(name: str) -> bool:
    """Whether a name that is no path here can be a Hub id rather than a mistyped path."""
    parts = name.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w][\w.-]*", part) for part in parts) or Path(parts[0]).exists():
        return False
    return not name.endswith(".safetensors") if len(parts) == 2 else name.endswith(".safetensors")


def fetch(name: str) -> Path:
    """The file behind a Hub id, from the cache or downloaded (an interrupted download goes on where it stopped).

    ``HF_HUB_OFFLINE`` and ``HF_HOME`` work as everywhere. Raises :class:`UserError`.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every retry twice; the last error is ours
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        if not file:
            try:
                files = [path for path in HfApi().list_repo_files(repo) if path.endswith(".safetensors")]
            except Exception:  # offline: what is in the cache will do
                folder = Path(snapshot_download(repo, local_files_only=True))
                files = [path.name for path in folder.glob("*.safetensors")]
            if len(files) != 1:
                known = ", ".join(f"{repo}/{path}" for path in sorted(files)) or "none"
                raise UserError(f"{name}: name one of its .safetensors files: {known}")
            file = files[0]
        try:
            return Path(hf_hub_download(repo, file, local_files_only=True))
        except Exception:  # not in the cache: this is the first time
            path = Path(hf_hub_download(repo, file))
            logger.warning(NOTICE)
            return path
    except UserError:
        raise
    except Exception as error:
        raise _refusal(name, "file", error) from None


def fetch_folder(name: str, patterns: list[str], **options: Any) -> Path:
    """The files of a repository that fit ``patterns``, in a folder of the cache; ``options`` go to the Hub's client."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:
        raise _refusal(name, "folder", error) from None


def _refusal(name: str, what: str, error: Exception) -> UserError:
    """The client raises a dozen kinds, from HTTP and its own; all mean that it is not available."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, LocalEntryNotFoundError):  # its text advises arguments that nobody here has passed
        reason = "not in the cache, and it could not be asked"
    return UserError(
        f"{name}: no such {what} here, and not available from the Hub ({reason}); check the name, the network and "
        f"HF_HUB_OFFLINE, or download the {what} by hand and pass its path"
    )
