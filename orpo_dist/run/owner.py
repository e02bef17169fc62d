"""One run per folder: a file names the process that trains in it, and its time of change is a heartbeat.

Locks are not used: on shared file systems they are often not there, or local to a node. On the owner's own machine its
process is looked up; from anywhere else its heartbeat is watched, by the file system's clock alone.
"""

import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import psutil

from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.errors import SaveError, UserError

OWNER_NAME = ".owner.json"
BEAT_SECONDS = 4.0
# A live owner of another machine shows within BEAT_SECONDS; one whose process is held up, by a slow disk for example,
# within this time. A restart elsewhere waits for as long since the last beat.
DEAD_SECONDS = 30.0
# Two starts may both find a dead owner: of the two that then write the file, the later one stays in it.
SETTLE_SECONDS = 1.0
_OF_THE_USER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Owner:
    """A process that trains.

    Attributes:
        machine: of one boot of one host and its process ids (a container has its own).
        started: when the process began, in seconds since the epoch; process ids are used again.
        job: of SLURM, else "".
    """

    host: str
    machine: str
    pid: int
    started: float
    job: str

    @classmethod
    def this_process(cls) -> "Owner":
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time(), job)

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        since = time.strftime("%F %T", time.localtime(self.started))
        return f"process {self.pid}{job} on {self.host}, started {since}"

    def is_local(self) -> bool:
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def runs_here(self) -> bool:
        """Whether the process is there; of a local owner only."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a run's folder within the block, which may be nested. A collective: every rank must enter it.

    Raises:
        UserError: another run trains in the folder, or it cannot be made.
        SaveError: it cannot be written now.
    """
    claim = _Claim(folder)
    on_first_rank(claim.take)
    try:
        yield
    finally:
        claim.release()


def check_owner(folder: Path) -> None:
    """Raises UserError if another process has taken the folder over, which was thought dead."""
    owner = _read(folder / OWNER_NAME)
    if owner is not None and owner != Owner.this_process():
        raise UserError(f"{folder} has been taken over by {owner}: this run was out of reach for too long and ends.")


class _Claim:
    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / OWNER_NAME
        self._released: threading.Event | None = None

    def take(self) -> None:
        this = Owner.this_process()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._create(this):
                self._beat()
                return
            other = _read(self._path)
            if other == this:
                return  # an outer block of this process owns it
            if other is not None and _is_alive(self._path, other):
                raise self._refusal(other)
            self._replace(this)
            time.sleep(SETTLE_SECONDS)
            now = _read(self._path)
            if now != this:
                raise self._refusal(now)
            self._beat()
        except OSError as error:
            kind = UserError if error.errno in _OF_THE_USER else SaveError
            raise kind(f"Cannot write the run's folder {self._folder}: {error.strerror or error}.") from error

    def release(self) -> None:
        if self._released is None:
            return
        self._released.set()
        with suppress(OSError):
            if _read(self._path) == Owner.this_process():
                self._path.unlink()

    def _create(self, owner: Owner) -> bool:
        try:
            with self._path.open("x", encoding="utf-8") as file:
                json.dump(asdict(owner), file)
        except FileExistsError:
            return False
        return _read(self._path) == owner

    def _replace(self, owner: Owner) -> None:
        temporary = self._path.with_name(f"{OWNER_NAME}.{owner.host}.{owner.pid}")
        temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        os.replace(temporary, self._path)

    def _beat(self) -> None:
        self._released = released = threading.Event()

        def beat() -> None:
            while not released.wait(BEAT_SECONDS):
                with suppress(OSError):  # the folder is away for a moment, or was removed
                    os.utime(self._path)

        threading.Thread(target=beat, name="owner", daemon=True).start()

    def _refusal(self, other: Owner | None) -> UserError:
        who = str(other) if other is not None else "another process"
        return UserError(
            f"Another run trains in {self._folder}: {who}. Wait for it or stop it, or use another --output_dir."
        )


def _is_alive(path: Path, owner: Owner) -> bool:
    if owner.is_local():
        return owner.runs_here()
    seen = _changed(path)
    left = DEAD_SECONDS - max(_clock(path.parent) - seen, 0.0)
    if left > 0:
        print(f"{path.parent}: waiting for a sign of life of {owner}.", flush=True)
    until = time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(0.5)
        if _changed(path) != seen:
            return True
    return False


def _read(path: Path) -> Owner | None:
    """None where there is no such file. One that cannot be read, such as one that is just being written, belongs to an
    unknown process elsewhere."""
    unknown = Owner("an unknown host", "", 0, 0.0, "")
    try:
        owner = Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        return unknown
    return owner if _is_of_a_process(owner) else unknown


def _is_of_a_process(owner: Owner) -> bool:
    """Whether the values are of the kinds that this program writes: a damaged file may still be JSON."""
    kinds_fit = all(
        type(value) is kind for value, kind in zip(astuple(owner), (str, str, int, float, str), strict=True)
    )
    return kinds_fit and 0 < owner.pid < 2**31 and 0 <= owner.started < 2**40


def _changed(path: Path) -> float:
    """Opened, since NFS asks the server again at each open. 0 where the file is gone."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _clock(folder: Path) -> float:
    """The time of the file system, which may differ from this machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        return os.fstat(file.fileno()).st_mtime


def _machine() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    except OSError:  # not Linux
        return str(psutil.boot_time())
