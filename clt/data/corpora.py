"""Text and images to show to a host: local files and folders, and Hugging Face data sets, as a stream of samples.

A record with an `image` (a path beside the file, a picture, or its bytes) is an image-text sample; its prompt is in
`prompt`, `query` or `question`. Any other record is text, in the column the caller names.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from clt.errors import DatasetError
from clt.types import Sample

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
PROMPT_KEYS = ("prompt", "query", "question")
ANSWER_KEYS = ("answer", "response")
PIECE_CHARACTERS = 4096
"""A .txt file is read in pieces of about this length, cut at a blank line or a line's end where there is one."""

BadSampleHandler = Callable[[str, DatasetError], None]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What to read and how.

    Iterating gives the samples in a fixed order, with bounded memory.

    Raises:
        DatasetError: (while iterating) nothing there, a damaged file, a column or an image that is missing.
    """

    path: str
    """A file, a folder of files, or the id of a Hugging Face data set."""
    split: str = "train"
    text_column: str = "text"
    streaming: bool = True
    cache_path: str | None = None
    image_prompt: str = "Describe this image."
    """Prompt for pictures that come without one."""
    on_bad_sample: BadSampleHandler | None = None
    """Called instead of stopping when one sample cannot be used; None: stop."""

    def __iter__(self) -> Iterator[Sample]:
        for name, record, folder in self._records():
            try:
                sample = self._sample(name, record, folder)
            except DatasetError as error:
                if self.on_bad_sample is None:
                    raise
                self.on_bad_sample(name, error)
                continue
            yield sample

    def _records(self) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
        path = Path(self.path)
        if path.is_file():
            yield from _read_file(path, self.text_column)
        elif path.is_dir():
            yield from _read_folder(path, self.text_column)
        elif self.path.startswith(("/", "./", "../", "~")) or path.suffix in TEXT_SUFFIXES:
            raise DatasetError(f"The corpus {self.path} does not exist (looked from {Path.cwd()}).")
        else:
            yield from _read_hub(self)

    def _sample(self, name: str, record: Mapping[str, Any], folder: Path) -> Sample:
        answer = next((record[key] for key in ANSWER_KEYS if isinstance(record.get(key), str)), None)
        if record.get("image") is not None:
            prompt = next((record[key] for key in (*PROMPT_KEYS, self.text_column) if record.get(key)), None)
            images = record["image"] if isinstance(record["image"], list) else [record["image"]]
            return Sample(
                id=name,
                prompt=prompt or self.image_prompt,
                images=tuple(_load_image(image, folder, name) for image in images),
                answer=answer,
                meta={key: value for key, value in record.items() if key != "image"},
            )
        text = record.get(self.text_column)
        asked = next((record[key] for key in PROMPT_KEYS if isinstance(record.get(key), str)), None)
        if text is None and asked is not None:
            raise DatasetError(
                f"{name} has a prompt ({asked[:40]!r}) but no image: samples with pictures need the column 'image'. "
                f"Its columns are: {', '.join(sorted(record))}.\n"
                "Text without pictures: name its column with --dataset-text-column."
            )
        if not isinstance(text, str):
            raise DatasetError(
                f"{name} has no text in column {self.text_column!r} (found {text!r}). Its columns are: "
                f"{', '.join(sorted(record))}.\nName the right one with --dataset-text-column."
            )
        return Sample(id=name, prompt=text)


def _read_folder(folder: Path, text_column: str) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not texts and not images:
        raise DatasetError(
            f"{folder} holds neither text ({', '.join(TEXT_SUFFIXES)}) nor images ({', '.join(IMAGE_SUFFIXES)})."
        )
    for path in texts:
        yield from _read_file(path, text_column)
    if not texts:
        for path in images:
            name = str(path.relative_to(folder))
            yield name, {"image": name}, folder


def _read_file(path: Path, text_column: str) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix.lower() in readers:
        for number, record in readers[path.suffix.lower()](path):
            yield f"{path.name}:{number}", record, path.parent
    else:
        for number, piece in enumerate(_read_text(path)):
            yield f"{path.name}:{number}", {text_column: piece}, path.parent


def _read_text(path: Path) -> Iterator[str]:
    rest = ""
    try:
        with path.open(encoding="utf-8") as file:
            while block := file.read(16 * PIECE_CHARACTERS):
                rest += block
                while len(rest) > PIECE_CHARACTERS:
                    cut = _end_of_piece(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}).") from None
    if rest.strip():
        yield rest


def _end_of_piece(text: str) -> int:
    for mark in ("\n\n", "\n", " "):
        cut = text.rfind(mark, PIECE_CHARACTERS // 2, PIECE_CHARACTERS)
        if cut >= 0:
            return cut + len(mark)
    return PIECE_CHARACTERS


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}, line {number} is not JSON ({error}). Was the file cut off?") from None
            yield number, _object(record, path, number)


def _read_json(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}). Was the file cut off?") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path} holds a JSON {type(records).__name__}; a list of objects is needed.")
    for number, record in enumerate(records):
        yield number, _object(record, path, number)


def _object(record: object, path: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise DatasetError(f"{path}, record {number} is a {type(record).__name__}; an object with columns is needed.")
    return record


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from pyarrow import ArrowInvalid, parquet  # only this format needs it

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
    except ArrowInvalid as error:
        raise DatasetError(f"{path} is not a parquet file ({error}). Was it cut off?") from None


def _read_hub(corpus: Corpus) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
    from datasets import load_dataset  # slow to import, and local files do not need it

    try:
        records = load_dataset(corpus.path, split=corpus.split, streaming=corpus.streaming, cache_dir=corpus.cache_path)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"The corpus {corpus.path!r} is no local file or folder, and Hugging Face has no such data set, no split "
            f"{corpus.split!r} of it, or cannot be reached:\n{error}"
        ) from error
    for number, record in enumerate(records):
        yield f"{corpus.path}:{number}", record, Path()


def _load_image(image: object, folder: Path, name: str) -> Image.Image:
    where = image if isinstance(image, str) else "its bytes"
    try:
        if isinstance(image, Image.Image):
            opened = image
        elif isinstance(image, str):
            opened = Image.open(BytesIO((folder / image).read_bytes()))
        elif isinstance(image, Mapping) and image.get("bytes"):
            opened = Image.open(BytesIO(image["bytes"]))
        else:
            raise DatasetError(f"{name}: image is a {type(image).__name__}; a path, a picture or bytes are needed.")
        return opened.convert("RGB")
    except FileNotFoundError:
        raise DatasetError(f"{name}: the image {where} does not exist (looked in {folder}).") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        # Pillow names the buffer, which says nothing to whoever named a file.
        why = "no kind of image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DatasetError(f"{name}: the image {where} cannot be read ({why}). It is damaged or no image.") from None
