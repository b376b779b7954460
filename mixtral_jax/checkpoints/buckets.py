"""Folders in buckets, gs://bucket/folder and s3://bucket/folder, for hosts that share no disk.

A folder is a path of etils' epath, whose files travel through fsspec; arrays go through TensorStore, by Orbax. Orbax
knows gs:// alone: see `_teach_orbax`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import fsspec  # type: ignore[import-untyped]
from etils import epath

from mixtral_jax.errors import InputError

Folder: TypeAlias = Any
"""A pathlib.Path on a disk, or an epath.Path in a bucket."""

_NEEDS = {"gs": ("gcsfs", "google.cloud.storage"), "s3": ("s3fs",)}
"""What each scheme's extra, of the same name, installs."""


def folder_at(path: str | os.PathLike[str], key: str) -> Folder:
    """The folder of a path or URL.

    Raises:
      InputError: under `key`: an unknown scheme, no bucket, or its extra is not installed.
    """
    text = os.fspath(path)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return Path(path)
    if scheme not in _NEEDS:
        raise InputError(key, text, f"a folder of this machine, or one in a bucket: {', '.join(_examples())}")
    if not rest.strip("/").partition("/")[2]:
        raise InputError(key, text, f"a bucket and a folder in it are needed: {scheme}://bucket/folder")
    missing = [name for name in _NEEDS[scheme] if not _is_there(name)]
    if missing:
        raise InputError(key, text, f"{scheme}:// needs {' and '.join(missing)}: pip install 'mixtral-jax[{scheme}]'")
    # What others wrote is to be seen: the clients keep listings of their own otherwise.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    if scheme == "s3":
        _teach_orbax()
    return epath.Path(text.rstrip("/"))


def _examples() -> Iterator[str]:
    return (f"{scheme}://bucket/folder" for scheme in _NEEDS)


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def is_remote(folder: Folder) -> bool:
    """Whether the folder is in a bucket."""
    return "://" in os.fspath(folder)


def absolute(folder: Folder) -> Folder:
    """The folder by its whole path."""
    return folder if is_remote(folder) else folder.absolute()


def filesystem(folder: Folder) -> tuple[Any, str]:
    """fsspec's file system of a bucket's folder, and the folder's name in it."""
    found: tuple[Any, str] = fsspec.core.url_to_fs(os.fspath(folder))
    return found


@contextmanager
def told_of_bucket(folder: Folder, key: str) -> Iterator[None]:
    """Turns what a bucket's client raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each client has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(key, os.fspath(folder), f"{reason}; a bucket that can be read and written is needed") from None


@contextmanager
def fetched(folder: Folder, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A copy, while the context lasts, of those files of a bucket's folder whose names are wanted."""
    copy = Path(tempfile.mkdtemp(prefix="mixtral-jax-"))
    try:
        system, root = filesystem(folder)
        for entry in system.ls(root, detail=True):
            name = entry["name"].rpartition("/")[2]
            if entry["type"] == "file" and wanted(name):
                system.get_file(entry["name"], str(copy / name))
        yield copy
    finally:
        shutil.rmtree(copy)


def send(copy: Path, folder: Folder, files: Iterable[Path]) -> None:
    """Puts files of the copy where they belong in the bucket."""
    system, root = filesystem(folder)
    for file in files:
        system.put_file(str(file), f"{root}/{file.relative_to(copy).as_posix()}")


@cache
def _teach_orbax() -> None:
    """Has Orbax treat s3:// as it treats gs://: a folder without renames, committed by a last small file, whose arrays
    TensorStore reads and writes by a driver of its own.

    Raises:
      InputError: an Orbax in which this is done elsewhere.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    places = [
        (gcs_utils, "_GCS_PATH_PREFIX"),
        (gcs_utils, "get_kvstore_for_gcs"),
        (tensorstore_utils, "_use_gcs_driver"),
        (tensorstore_utils, "_normalize_path"),
    ]
    if not all(hasattr(module, name) for module, name in places):
        import orbax.checkpoint

        raise InputError("s3://", orbax.checkpoint.__version__, "this orbax-checkpoint is not known to write to it")
    of_gcs, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
    gcs_utils.get_kvstore_for_gcs = lambda path: _s3_store(path) if path.startswith("s3://") else of_gcs(path)
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://", 1)


def _s3_store(path: str) -> dict[str, Any]:
    """TensorStore's description of a path; it takes an endpoint and keys from the environment only if told to."""
    bucket, _, inside = path.removeprefix("s3://").partition("/")
    store: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": inside}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        store["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        store["aws_credentials"] = {"type": "environment"}
    return store
