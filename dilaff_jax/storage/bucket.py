"""A folder of a bucket, gs:// or s3://: listed, read, written, with patience.

The protocols are those of gcsfs and s3fs. Their own retries last seconds; here a bucket that fails
for minutes is waited for, and what no waiting mends is said at once.
"""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import importlib
import logging as stdlib_logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from absl import logging

from dilaff_jax.errors import UserError

# Protocol: library, extra of this package, how one logs in.
_LIBRARIES = {
    "gs": ("gcsfs", "gcs", "gcloud auth application-default login"),
    "s3": ("s3fs", "s3", "aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
}
# Seconds for which a bucket that fails is asked again.
PATIENCE = 300.0
# Seconds that a connection, and then the next bytes, may take.
_CONNECT, _READ = 20, 60
_AT_ONCE = 8  # transfers
_AT_A_TIME = 32 << 20  # bytes that are sent in one piece, as they are at that moment
_PASSING = (errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.ECONNRESET, errno.EPIPE)
_T = TypeVar("_T")


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket: gs://BUCKET/... or s3://BUCKET/..."""
    return isinstance(path, str) and re.match(rf"({'|'.join(_LIBRARIES)})://", path) is not None


class Item(NamedTuple):
    """An object: its bytes, and what changes whenever it is written."""

    size: int
    version: str


class Unreachable(OSError):  # noqa: N818 - as FileNotFoundError's kin are named by what happened
    """A bucket failed for longer than was waited."""


class Bucket:
    """The objects below `address`.

    Args:
        address: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; BUCKET has to exist, FOLDER need not.
        patience: seconds for which a failing bucket is asked again.

    Raises:
        UserError: it is no such address, or the library for it is not installed.
    """

    def __init__(self, address: str, patience: float | None = None) -> None:
        match = re.fullmatch(r"(gs|s3)://([^/]+)((?:/[^/]+)*)/*", address)
        if match is None:
            raise UserError(f"{address!r}: want gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
        self.address = address.rstrip("/")
        self._root = match[2] + match[3]
        self._scheme, self._patience = match[1], PATIENCE if patience is None else patience
        library, extra, self._login = _LIBRARIES[self._scheme]
        stdlib_logging.getLogger(library).setLevel(stdlib_logging.CRITICAL)  # said once, here
        try:
            importlib.import_module(library)
        except ImportError as e:
            raise UserError(
                f"{address} needs {library}: pip install 'dilaff-jax[{extra}]', or in a checkout "
                f"pip install -e '.[{extra}]'"
            ) from e
        self._system = _file_system(self._scheme)

    def list(self, within: str = "", *, patience: float | None = None) -> dict[str, Item]:
        """All objects below the folder (or below `within` in it), by name relative to the folder.

        The object that has the folder's own name, where the address is of one, is "".

        Raises:
            UserError: a name that no file can have, or that would lie outside of a copy.
        """
        folder = f"{self._root}/{within}" if within else self._root

        def ask() -> dict[str, Any]:
            found = self._system.find(folder, detail=True)
            if not found and not self._system.exists(self._root.split("/")[0]):
                raise FileNotFoundError(folder)
            return found

        result = {}
        for whole, about in self._patiently(ask, patience=patience).items():
            if about["type"] == "file" and not whole.endswith("/"):
                name = whole[len(self._root) :].removeprefix("/")
                if name and not {"", ".", ".."}.isdisjoint(name.split("/")):
                    raise UserError(
                        f"{self.address} holds an object named {name!r}, which no file can be "
                        "called; rename it"
                    )
                result[name] = Item(int(about["size"]), _version(about))
        return result

    def read(self, name: str) -> bytes | None:
        """The content of an object, None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._patiently(lambda: self._system.cat_file(self._path(name)), missing=True)
        return None

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object that must not be there; of several who do at once, one is told True."""
        try:
            self._patiently(lambda: self._write(name, content, only_new=True))
        except FileExistsError:
            # An answer that was lost is asked for again, and then refused: it was ours.
            return self.read(name) == content
        return True

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, whatever was there."""
        self._patiently(lambda: self._write(name, content))

    def fetch(self, names: Iterable[str], folder: pathlib.Path, done: Callable[[str], Any]) -> None:
        """Copies objects to files of the same names below `folder`; each replaces what was there.

        Args:
            names: as `list` has them.
            folder: on a disk.
            done: called with each name that is there.
        """
        parts = folder.with_name(f"{folder.name}.part")

        def one(name: str) -> str:
            part, path = parts / name, folder / name
            part.parent.mkdir(parents=True, exist_ok=True)
            self._patiently(lambda: self._system.get_file(self._path(name), str(part)))
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
            return name

        shutil.rmtree(parts, ignore_errors=True)
        try:
            self._all(one, names, done)
        finally:
            shutil.rmtree(parts, ignore_errors=True)

    def put(self, names: Iterable[str], folder: pathlib.Path, done: Callable[[str], Any]) -> None:
        """Copies files below `folder` to objects of the same names; the inverse of `fetch`.

        A file that is gone meanwhile, or that is large and grows, is passed over: `done` is not
        called for it.
        """

        def one(name: str) -> str | None:
            path = folder / name
            try:
                before = path.stat()
                if before.st_size <= _AT_A_TIME:
                    self.write(name, path.read_bytes())
                    return name
            except FileNotFoundError:
                return None
            try:
                self._patiently(lambda: self._system.put_file(str(path), self._path(name)))
            except (OSError, UserError):
                if not path.exists() or path.stat().st_mtime_ns != before.st_mtime_ns:
                    return None
                raise
            return name

        self._all(one, names, lambda name: name is not None and done(name))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are no error."""

        def one(name: str) -> str:
            with contextlib.suppress(FileNotFoundError):
                self._patiently(lambda: self._system.rm_file(self._path(name)), missing=True)
            return name

        self._all(one, names, lambda name: None)

    def _write(self, name: str, content: bytes, only_new: bool = False) -> None:
        if self._scheme == "s3" or not content:
            mode = "create" if only_new else "overwrite"
            self._system.pipe_file(self._path(name), content, mode=mode)
            return
        # Not by gcsfs's pipe_file, which puts what is sent between lines: a content that ends in a
        # carriage return may lose it.
        bucket, _, key = self._path(name).partition("/")
        about = self._system.call(
            "POST",
            f"{self._system._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="media",
            name=key,
            headers={"Content-Type": "application/octet-stream"},
            data=content,
            json_out=True,
            **({"ifGenerationMatch": "0"} if only_new else {}),
        )
        wanted = base64.b64encode(hashlib.md5(content).digest()).decode()
        if about["md5Hash"] != wanted:
            raise OSError(errno.EIO, f"{name} arrived as something else")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _all(
        self, one: Callable[[str], Any], names: Iterable[str], done: Callable[[Any], Any]
    ) -> None:
        """Calls `one` for all names, some at once; what was not begun is not, where one raises."""
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            running = [pool.submit(one, name) for name in names]
            try:
                for future in concurrent.futures.as_completed(running):
                    done(future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _patiently(
        self, call: Callable[[], _T], *, missing: bool = False, patience: float | None = None
    ) -> _T:
        """What `call` returns, asked again while the bucket fails.

        Args:
            call: may be called many times.
            missing: raise FileNotFoundError, for a caller that knows what it means.
            patience: by default the bucket's.
        """
        patience = self._patience if patience is None else patience
        begun, wait, said = time.monotonic(), 1.0, False
        while True:
            try:
                return call()
            except FileExistsError:
                raise
            except Exception as error:
                if isinstance(error, FileNotFoundError):
                    if missing:
                        raise
                    raise UserError(self._no_bucket()) from error
                if not _passes(error):
                    raise self._refused(error) from error
                lasted = time.monotonic() - begun
                if lasted + wait > patience:
                    raise Unreachable(
                        f"{self.address} failed for {lasted:.0f} s ({_line(error)}); run again "
                        "when it is back"
                    ) from error
                if not said:
                    logging.warning("%s fails (%s); trying again", self.address, _line(error))
                said = True
            time.sleep(wait)
            wait = min(2 * wait, 30.0)

    def _no_bucket(self) -> str:
        bucket = f"{self._scheme}://{self._root.split('/')[0]}"
        return f"{self.address}: there is no bucket {bucket}; make it, or correct its name"

    def _refused(self, error: Exception) -> Exception:
        text = _line(error)
        refused = isinstance(error, PermissionError) or _code(error) in (401, 403)
        if refused or re.search("credential|forbidden|denied|token", text, re.IGNORECASE):
            return UserError(
                f"{self.address}: no access ({text}); log in ({self._login}), or ask its owner to "
                "let you read and write"
            )
        return OSError(f"{self.address}: {text}")


def _file_system(scheme: str) -> Any:
    """The library's file system, without a memory of what it listed before."""
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":
        import aiohttp
        from gcsfs.core import GCSFileSystem  # gcsfs's other one asks by gRPC, too

        options["consistency"] = "md5"
        options["requests_timeout"] = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT, sock_read=_READ
        )
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # which knows no credentials
            options["token"] = "anon"
        return GCSFileSystem(**options)
    import s3fs

    options["config_kwargs"] = {"connect_timeout": _CONNECT, "read_timeout": _READ}
    return s3fs.S3FileSystem(**options)


def _version(about: dict[str, Any]) -> str:
    return str(about.get("generation") or about.get("ETag") or about["etag"])


def _code(error: Exception) -> int | None:
    code = getattr(error, "code", None) or getattr(error, "status", None)
    return int(str(code)) if str(code).isdigit() else None


def _passes(error: Exception) -> bool:
    """Whether an error is one of those that time mends: of the server, the line, or a rate."""
    code = _code(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING:
        return True
    # Those of aiohttp, requests and botocore for lines that break; google.auth's for its server.
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return not kinds.isdisjoint(
        {
            "aiohttp.client_exceptions.ClientConnectionError",
            "aiohttp.client_exceptions.ClientPayloadError",
            "botocore.exceptions.HTTPClientError",
            "botocore.exceptions.ConnectionError",
            "botocore.parsers.ResponseParserError",
            "google.auth.exceptions.TransportError",
            "gcsfs.retry.ChecksumError",
            "requests.exceptions.ConnectionError",
            "requests.exceptions.Timeout",
            "requests.exceptions.ChunkedEncodingError",
        }
    )


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"
