"""Files sent to a repository on the hub one at a time, each confirmed before it may go here.

To the hub they are names, sizes and hashes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import sha_fileobj

from ..errors import HubError

# What the hub's client raises for a broken connection is of the HTTP library it stands on, which has changed.
_HTTP_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

# What decides which weights a library loads from a repository.
_WEIGHTS = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|(pytorch|adapter)_model[^/]*\.bin(\.index\.json)?|adapter_config\.json"
)


class HubUpload:
    """A model repository, made if it is not there.

    Args:
        repo: `name` or `owner/name`. Endpoint and token are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN or the
            token that `hf auth login` stored.

    Raises:
        HubError: it cannot be made or reached, or the token may not write to it.
    """

    def __init__(self, repo: str) -> None:
        self._api = HfApi()
        with self._explained(f"the repository {repo} cannot be made or reached", "Log in with `hf auth login`"):
            self.repo: str = self._api.create_repo(repo, exist_ok=True).repo_id

    def put(self, path: Path) -> dict[str, Any]:
        """Send a file and ask the hub what it has now.

        Returns:
            `sha256`, `size` in bytes and the `commit` of the file there.

        Raises:
            HubError: sending failed, or the hub has something else. The file here is as it was.
        """
        with open(path, "rb") as stream:
            digest, size = sha_fileobj(stream).hex(), path.stat().st_size
        with self._explained(f"{path} was not uploaded to {self.repo}", "It is still here; run the same command again"):
            commit = self._api.upload_file(
                path_or_fileobj=str(path), path_in_repo=path.name, repo_id=self.repo, commit_message=f"Add {path.name}"
            )
            found: list[Any] = self._api.get_paths_info(self.repo, [path.name], revision=commit.oid)
        there = found[0] if found else None
        checksum = there.lfs.sha256 if there is not None and there.lfs is not None else None
        if there is None or there.size != size or checksum != digest:
            has = "nothing" if there is None else f"{there.size} bytes with sha256 {checksum}"
            raise HubError(
                f"{path}: {size} bytes with sha256 {digest} were uploaded to {self.repo}, which has {has}. "
                "The file is still here; run the same command again"
            )
        return {"repo": self.repo, "sha256": digest, "size": size, "commit": commit.oid}

    def weights(self) -> list[str]:
        """Names of the files there that hold weights or say which files do.

        Raises:
            HubError: the hub could not be asked.
        """
        with self._explained(f"the files of {self.repo} cannot be listed", "Run the same command again"):
            return sorted(name for name in self._api.list_repo_files(self.repo) if _WEIGHTS.fullmatch(name))

    def put_rest(self, folder: Path, remove: Collection[str] = ()) -> None:
        """Send every other file of a directory in one commit, which removes some there; hidden ones stay.

        Raises:
            HubError: sending failed.
        """
        paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
        with self._explained(f"{folder} was not uploaded to {self.repo}", "Run the same command again"):
            self._api.create_commit(
                self.repo,
                [
                    *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path)) for path in paths),
                    *(CommitOperationDelete(path_in_repo=name) for name in remove),
                ],
                commit_message="Add configuration and tokenizer",
            )

    @contextlib.contextmanager
    def _explained(self, what: str, advice: str) -> Iterator[None]:
        try:
            yield
        except (_HTTP_ERROR, ValueError, RuntimeError, OSError) as error:  # all that huggingface_hub lets out
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
            raise HubError(f"{what}: {str(cause) or type(cause).__name__}. {advice}") from error
