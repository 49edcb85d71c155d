"""Published files: found in a folder or downloaded, checked against their digest, read without running what they hold.

Lay the files into a folder and name it by the argument ``folder`` (--data of a script) or by the environment variable
LIGHTNING_SPECTRAL_DATA; without either it is ./paper-data. What is absent is downloaded there.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor

FOLDER_VARIABLE = "LIGHTNING_SPECTRAL_DATA"
DEFAULT_FOLDER = "paper-data"
CHUNK = 1 << 20
TIMEOUT = 60
"""Seconds without an answer after which a download is given up."""

LARGEST_MEMBER = 1 << 28
"""Bytes; the largest file that is read out of an archive, CIFAR-100's training part, has 1.6e8."""


class ArchiveError(RuntimeError):
    """A file that is absent, damaged, or not what it should be; the message says which and what to do."""


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        name: of the file.
        url: where it is downloaded from.
        digest: algorithm and hexadecimal digest of the whole file, as "md5:c58f..."; None: read it unchecked, which is
            for files that one has made oneself.
    """

    name: str
    url: str
    digest: str | None


def data_folder(folder: str | Path | None = None) -> Path:
    """The folder given, else the one that LIGHTNING_SPECTRAL_DATA names, else ./paper-data."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()


def fetch(archive: Archive, folder: str | Path | None = None, *, download: bool = True) -> Path:
    """The file's path, downloaded if it is absent, its digest checked.

    Raises:
        ArchiveError: if it is absent and cannot be or is not to be downloaded, or its digest is another.
    """
    path = data_folder(folder) / archive.name
    if path.is_file():
        if differs := _difference(path, archive):
            raise ArchiveError(
                f"{path} is not the published file: {differs}; delete it and run again, or get it anew from "
                f"{archive.url}"
            )
    elif download:
        _download(archive, path)
    else:
        raise ArchiveError(f"{path} is absent; {_by_hand(archive)}")
    return path


def _difference(path: Path, archive: Archive) -> str | None:
    """What the digest of the file must be and is, None where they are the same or it is not to be checked."""
    if archive.digest is None:
        return None
    algorithm, _, expected = archive.digest.partition(":")
    # The digest tells a damaged file from the published one; nobody's secrets depend on it.
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found == expected:
        return None
    return f"its {algorithm} must be {expected}, found {found} ({path.stat().st_size} bytes)"


def _download(archive: Archive, path: Path) -> None:
    """Write next to ``path`` and rename when whole and checked, so that no broken file ever has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urlopen(archive.url, timeout=TIMEOUT) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file, CHUNK)
            promised = answer.headers.get("Content-Length")
        # A connection that breaks ends the stream without an error.
        if promised is not None and part.stat().st_size != int(promised):
            raise OSError(f"the connection ended after {part.stat().st_size} of {promised} bytes")
        if differs := _difference(part, archive):
            raise OSError(f"what came is not the published file: {differs}")
        part.replace(path)
    except (OSError, HTTPException) as error:
        raise ArchiveError(f"{path} is absent, and downloading it failed ({error}); {_by_hand(archive)}") from error
    finally:
        part.unlink(missing_ok=True)


def _by_hand(archive: Archive) -> str:
    return (
        f"get {archive.url} and lay it there as {archive.name}, or name the folder that holds it by --data or the "
        f"environment variable {FOLDER_VARIABLE}"
    )


def tar_members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Contents of the named files of a .tar.gz, in memory: nothing is unpacked to the disk.

    Raises:
        ArchiveError: if it cannot be read, or a name is absent, no plain file, or larger than `LARGEST_MEMBER`.
    """
    wanted = set(names)
    found: dict[str, bytes] = {}
    try:
        # As a stream: going back in it would decompress all of it again.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.name in wanted - found.keys():
                    if not member.isreg() or member.size > LARGEST_MEMBER:
                        raise ArchiveError(f"{path}: {member.name} is no plain file of up to {LARGEST_MEMBER} bytes")
                    file = archive.extractfile(member)
                    found[member.name] = file.read() if file is not None else b""
                if found.keys() == wanted:
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ArchiveError(f"{path} cannot be read as a .tar.gz ({error}); delete it and run again") from error
    if absent := wanted - found.keys():
        raise ArchiveError(f"{path} holds no {', '.join(sorted(absent))}; it is not the published file")
    return found


class PickledArray:
    """What an unpickled numpy array is here: its state, without numpy taking any of it for its own."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        """The array of unsigned bytes, in a memory of its own.

        Raises:
            ValueError, TypeError, RuntimeError: if it is none.
        """
        _version, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, PickledDtype) or dtype.code not in (b"u1", "u1") or not isinstance(data, bytes):
            raise ValueError("an array that is not of unsigned bytes")
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return flat.view(*reversed(shape)).permute(*reversed(range(len(shape)))) if fortran else flat.view(*shape)


class PickledDtype:
    """What an unpickled numpy dtype is here: its code."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        # Byte order and fields, which unsigned bytes have not.
        pass


def _reconstruct(*arguments: Any) -> PickledArray:
    return PickledArray()


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
}
"""All that the published batches, pickled by Python 2, ask for by name."""


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and `PickledArray`; asking for anything else by name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise ArchiveError(f"it asks for {module}.{name}, which the published batches do not: do not trust it")
        return STAND_INS[module, name]


def read_batch(data: bytes, labels: bytes, what: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) of unsigned bytes and labels (N,) of one of CIFAR's pickled batches.

    Nothing that a pickle names is imported or called, whoever has written it.

    Args:
        data: the pickle.
        labels: the key of the labels.
        what: what an error names.

    Raises:
        ArchiveError: if it asks for anything but arrays, or is no batch.
    """
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        images = batch[b"data"].tensor().reshape(-1, 3, 32, 32)
        numbers = torch.tensor(batch[labels], dtype=torch.long)
    except ArchiveError as error:
        raise ArchiveError(f"{what} is refused: {error}") from None
    except Exception as error:
        # Broken pickles raise nearly anything.
        raise ArchiveError(f"{what} is no batch of CIFAR ({type(error).__name__}: {error})") from error
    if numbers.shape != images.shape[:1]:
        raise ArchiveError(f"{what} holds {len(images)} images and labels of shape {tuple(numbers.shape)}")
    return images.contiguous(), numbers
