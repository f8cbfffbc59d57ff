"""Pages as files: safetensors with a description and a checksum of the whole file in the header.

A file stands for the tokens of one page behind the page in its parent's file. Its name is a digest of the parent's
name and the ids; the first page's parent is a digest of the identity (model, weights, KV format) and the cache key.
Names only find files: what is in a file is compared with what is wanted, exactly.

A file is written beside its place and then renamed, so that it is there as a whole or not at all; whatever else
happens to it (a power cut, a full disk, a flipped bit), the checksum shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from specgen._base.log import Log

log = Log("specgen.kv")

_SUFFIX = ".kv.safetensors"
_OURS = re.compile(r"[0-9a-f]{64}" + re.escape(_SUFFIX))
_SCRATCH = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.part")
_NO_SUM = b'"sha256":"' + b"0" * 64 + b'"'
_LONGEST_HEADER = 1 << 20
_STALE_SECONDS = 300.0
_PAUSE_SECONDS = 30.0


class DamagedPage(Exception):
    """A file that does not hold what its checksum says."""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What a file says about itself. `parent` is the name of the page before, or of the root."""

    identity: str
    key: Mapping[str, str]
    parent: str
    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """Digest of all of it."""
        return page_name(self.parent, self.ids)


def root_name(identity: str, key: Mapping[str, str]) -> str:
    """The parent of first pages."""
    return _digest(json.dumps([identity, dict(sorted(key.items()))]))


def page_name(parent: str, ids: Sequence[int]) -> str:
    """The name of the page that holds `ids` behind `parent`."""
    return _digest(f"{parent}:{','.join(map(str, ids))}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def encode(header: PageHeader, rows: Sequence[Tensor]) -> bytes:
    """The file of a page."""
    tensors = {str(index): tensor.detach().cpu().contiguous() for index, tensor in enumerate(rows)}
    raw: bytes = save(tensors, {"page": json.dumps(asdict(header), sort_keys=True), "sha256": "0" * 64})
    return raw.replace(_NO_SUM, _sum_field(hashlib.sha256(raw).hexdigest()), 1)


def decode(raw: bytes) -> tuple[PageHeader, list[Tensor]]:
    """What `encode` was given. Raises DamagedPage."""
    header, written = _parse(raw)
    blank = raw.replace(_sum_field(written), _NO_SUM, 1)
    if hashlib.sha256(blank).hexdigest() != written:
        raise DamagedPage("its checksum is wrong")
    try:
        tensors = load(raw)
        return header, [tensors[str(index)] for index in range(len(tensors))]
    except Exception as error:  # whatever safetensors makes of bytes that are not its own
        raise DamagedPage(f"it cannot be read: {error}") from error


def read_header(path: Path) -> PageHeader:
    """The description alone, not proven by the checksum. Raises DamagedPage or OSError."""
    with path.open("rb") as file:
        start = file.read(8)
        raw = start + file.read(min(int.from_bytes(start, "little"), _LONGEST_HEADER))
    return _parse(raw)[0]


def _sum_field(digest: str) -> bytes:
    return b'"sha256":"' + digest.encode() + b'"'


def _parse(raw: bytes) -> tuple[PageHeader, str]:
    length = int.from_bytes(raw[:8], "little")
    if not 0 < length <= min(_LONGEST_HEADER, len(raw) - 8):
        raise DamagedPage("it is cut short")
    try:
        metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
        fields = json.loads(metadata["page"])
        ids = tuple(fields.pop("ids"))
        if not all(isinstance(token, int) for token in ids):
            raise DamagedPage("its ids are no numbers")
        return PageHeader(**fields, ids=ids), str(metadata["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedPage(f"its header makes no sense: {error!r}") from error


class Written(NamedTuple):
    """Whether a page has a file now, and the names of the pages whose files were deleted to make room."""

    stored: bool
    dropped: tuple[str, ...] = ()


class PageFiles:
    """Files of pages in one folder, of `max_bytes` bytes in all; the least recently used are deleted first.

    Other files in the folder are left alone; pages of other models are too, as long as there is room.
    A fault is a page less and a line in the log.
    writable: whether files may be deleted, damaged ones included; raises OSError where the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None, *, writable: bool = True) -> None:
        self.folder = folder
        self._writable = writable
        self.bytes = 0
        self.max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._pause_until = 0.0
        if writable:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._list()

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def headers(self, identity: str) -> Iterator[PageHeader]:
        """The pages of `identity`; others are passed over with a line in the log."""
        foreign = 0
        for name in list(self._sizes):
            try:
                header = read_header(self._path(name))
            except (DamagedPage, OSError) as error:
                self._reject(name, error)
                continue
            if header.identity != identity:
                foreign += 1
            elif header.name != name:
                self._reject(name, DamagedPage("it stands under another page's name"))
            else:
                yield header
        if foreign:
            log.info("pages of other models or KV formats are passed over", folder=str(self.folder), files=foreign)

    def write(self, header: PageHeader, rows: Sequence[Tensor]) -> Written:
        """Keep a page; not stored when that did not work, or is not tried because it just failed."""
        name = header.name
        if name in self._sizes:
            return Written(self.use(name))
        if time.monotonic() < self._pause_until:
            return Written(False)
        raw = encode(header, rows)
        if self.max_bytes is not None and len(raw) > self.max_bytes:
            return Written(False)
        scratch = self.folder / f"{name}.{secrets.token_hex(8)}.part"
        try:
            with open(scratch, "xb", opener=_private) as file:
                file.write(raw)
            scratch.replace(self._path(name))
        except OSError as error:
            self._pause_until = time.monotonic() + _PAUSE_SECONDS
            log.warning("a page cannot be kept on disk", folder=str(self.folder), error=str(error))
            _unlink(scratch)
            return Written(False)
        self._sizes[name] = len(raw)
        self.bytes += len(raw)
        dropped = self._shrink()
        return Written(name in self._sizes, dropped)

    def read(self, wanted: PageHeader) -> list[Tensor] | None:
        """The rows of a page, or None when they are not there as they were written; then the file goes."""
        name = wanted.name
        if name not in self._sizes:
            return None
        try:
            raw = self._path(name).read_bytes()
            header, rows = decode(raw)
            if header != wanted:
                raise DamagedPage("it holds another page")
        except (DamagedPage, OSError) as error:
            self._reject(name, error)
            return None
        return rows if self.use(name) else None

    def use(self, name: str) -> bool:
        """Take a page that is there for the one used last; False if its file is out of reach, and then it goes."""
        try:
            if self._writable:
                os.utime(self._path(name))
        except OSError as error:
            self._reject(name, error)
            return False
        self._sizes.move_to_end(name)
        return True

    def age(self, name: str) -> None:
        """Take a page that is there for the one to be deleted first."""
        self._sizes.move_to_end(name, last=False)

    def remove(self, name: str) -> None:
        """Delete a page; one that is not there is fine."""
        if name in self._sizes:
            self.bytes -= self._sizes.pop(name)
            if self._writable:
                _unlink(self._path(name))

    def _list(self) -> None:
        """Take stock: whole files in order of use; what a writer left behind when it was killed goes."""
        found: list[tuple[float, str, int]] = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except OSError:
                continue
            if _OURS.fullmatch(entry.name):
                found.append((status.st_mtime, entry.name.removesuffix(_SUFFIX), status.st_size))
            elif self._writable and _SCRATCH.fullmatch(entry.name) and time.time() - status.st_mtime > _STALE_SECONDS:
                _unlink(Path(entry.path))
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self.bytes += size
        self._shrink()

    def _shrink(self) -> tuple[str, ...]:
        """The names of the pages that had to go."""
        dropped: list[str] = []
        while self.max_bytes is not None and self.bytes > self.max_bytes:
            dropped.append(next(iter(self._sizes)))
            self.remove(dropped[-1])
        return tuple(dropped)

    def _reject(self, name: str, error: Exception) -> None:
        log.warning("a page on disk is of no use", file=str(self._path(name)), error=str(error))
        self.remove(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"


def _private(path: str, flags: int) -> int:
    """Texts can be told from their KV: files are for their owner alone."""
    return os.open(path, flags, 0o600)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("a file cannot be deleted", file=str(path), error=str(error))
