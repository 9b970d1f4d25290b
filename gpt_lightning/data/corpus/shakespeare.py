"""Tiny Shakespeare, downloaded on first use."""

import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from gpt_lightning.data.corpus.base import Split, file_sha256, reason_of
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.files import atomic_write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shakespeare(TextFiles):
    """Tiny Shakespeare (1,115,394 characters), downloaded to `folder` on first use.

    Source: https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare

    Args:
        path: A local copy instead; the other arguments of TextFiles hold as well.

    Raises:
        ValueError, OSError: When read, as TextFiles and `download`.
    """

    path: str | Sequence[str] | None = None  # type: ignore[assignment]
    _: KW_ONLY
    folder: str = "data"
    url: str = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256: str = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def files(self, split: Split) -> list[Path]:
        """The files that a split is read from; none before the download."""
        return super().files(split) if self.path is not None or self._local.is_file() else []

    @property
    def _local(self) -> Path:
        return Path(self.folder).expanduser() / "tinyshakespeare.txt"

    def _find(self) -> list[Path]:
        return super()._find() if self.path is not None else [download(self.url, self._local, self.sha256)]


def download(url: str, target: Path, sha256: str) -> Path:
    """Fetches a file once, checks it, and gives it its name only then.

    Raises:
        OSError: If it cannot be fetched or written.
        ValueError: If what came is not what was expected.
    """
    if target.is_file():
        if file_sha256(target) == sha256:
            return target
        log.warning("%s is damaged (its checksum differs); downloading it again", target)
    remedy = "download it in another way and set data.path= to the file"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{url} sent something else than expected (the checksum differs); {remedy}")
        with atomic_write(target, suffix=f".{os.getpid()}.tmp") as file:
            file.write(content)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise OSError(f"cannot download {url} to {target} ({reason_of(error)}); {remedy}") from error
    return target
