"""Files of a repository on the Hugging Face Hub, read by ranges: `hf://datasets/OWNER/NAME[@revision]/folder`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from httpx import HTTPError
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from clt.errors import DatasetError

HUB_SCHEME = "hf://"
_AT_ONCE = 8
HUB_ERRORS = (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError)


class HubFolder:
    """A folder on the Hub; token and address come from the environment (HF_TOKEN, HF_ENDPOINT), as its own tools do it.

    Args:
        url: `hf://datasets/OWNER/NAME/folder`, with `@revision` after the name for another than `main`.

    Raises:
        DatasetError: the address is of another form.
    """

    def __init__(self, url: str) -> None:
        self._folder = url.removeprefix(HUB_SCHEME)
        if len(self._folder.split("/")) < 3:
            raise DatasetError(f"{url} needs the form hf://datasets/OWNER/NAME[@revision]/folder.")
        self._files = HfFileSystem()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self._files.info(f"{self._folder}/{name}")["size"])

    def get(self, name: str) -> bytes:
        """A whole file."""
        return self._range(name, None, None)

    def ranges(self, name: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Some ranges of a file, several at once."""
        self.size(name)  # the answer is kept, so that the threads need not all ask for it
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda start, end: self._range(name, start, end), starts, ends))

    def _range(self, name: str, start: int | None, end: int | None) -> bytes:
        found = self._files.cat_file(f"{self._folder}/{name}", start=start, end=end, cache_type="none")
        assert isinstance(found, bytes)
        return found
