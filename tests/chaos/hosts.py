"""Hosts: parts of this machine that share no more with each other than machines do. Knows nothing of Ray.

A host has a network namespace with an address on a bridge, its own processes, /tmp and /dev/shm; the storage that all
share is at one path, the root's file system read-only. Its first process waits for the end of its input, which this
process holds: when one ends, the other does, and the kernel ends what else runs there.

Where namespaces are not allowed (`IN_NAMESPACES` is not set), a host is a group of processes with an address of the
loopback device and a folder of its own, and a link cannot be cut.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

IN_NAMESPACES = "PACOS_CHAOS_IN_NAMESPACES"
REPOSITORY = Path(__file__).parents[2]
SMALL_DISK_BYTES = 48 * 2**20
_OF_HOST = "PACOS_CHAOS_HOST"

# $1 the host's own disk, $2 the shared storage, then what it may read though it lies in /tmp.
_BOOT = """
set -e
disk=$1 shared=$2
shift
for path; do
    case $path in /tmp/*) place=$disk/${path#/tmp/};; *) place=$path;; esac
    mkdir -p "$place"
    [ "$path" = "$shared" ] && mount --rbind "$path" "$place" || mount -o bind,ro "$path" "$place"
done
mount --rbind "$disk" /tmp
mount --bind /tmp/hosts /etc/hosts
mount --bind /tmp/resolv.conf /etc/resolv.conf
mount -t tmpfs none /dev/shm
mount -o remount,bind,ro /
ip link set lo up
echo up
read -r _
"""


@dataclass(eq=False)
class Host:
    name: str
    address: str
    disk: Path
    """What lies in its /tmp, seen from here."""
    shared: Path
    names: dict[str, str]
    """By address, of all hosts: this one's /etc/hosts."""
    environment: dict[str, str]
    number: int
    in_namespaces: bool
    _unshare: subprocess.Popen[bytes] | None = None
    _init: int = 0
    _slowness: ExitStack = field(default_factory=ExitStack)

    def boot(self) -> None:
        """With the disk that it had before, if it had one."""
        self.disk.mkdir(parents=True, exist_ok=True)
        (self.disk / "home").mkdir(exist_ok=True)
        known = {"127.0.0.1": "localhost", **self.names}
        (self.disk / "hosts").write_text("".join(f"{address} {name}\n" for address, name in known.items()))
        # No name server can be reached, and one that is silent costs 10 s for each address that torch asks about.
        (self.disk / "resolv.conf").write_text("")
        if not self.in_namespaces:
            return
        paths = dict.fromkeys([self.shared, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)])
        # What lies in /usr is there anyway; a bind of it would hide nothing, but cost a mount.
        visible = [str(path) for path in paths if not path.is_relative_to("/usr")]
        with (self.disk / "boot.log").open("ab") as log:
            self._unshare = subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash",
                 "-c", _BOOT, "host", self.disk, *visible],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == b"up\n", (self.disk / "boot.log").read_text()
        self._init = int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text())
        _ip(f"link add {self._link} type veth peer name eth0 netns {self._init}")
        _ip(f"link set {self._link} master bridge up")
        network = self.address.rpartition(".")[0]
        # The way out leads nowhere, but Ray asks the kernel by which address it would go there.
        for command in (
            f"addr add {self.address}/24 dev eth0", "link set eth0 up", f"route add default via {network}.254"
        ):  # fmt: skip
            subprocess.run([*self._enter("--net"), "ip", *command.split()], check=True)
        subprocess.run([*self._enter("--uts"), "hostname", self.name], check=True)

    def start(self, command: Sequence[object], *, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """`command` in the repository's folder, on this host; what it prints goes to `log` on the host's disk."""
        with (self.disk / log).open("ab") as output:
            return subprocess.Popen(
                self._on_this_host(command), env=self._environment(environment), cwd=REPOSITORY, stdout=output,
                stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, command: Sequence[object], *, timeout_s: float = 500, **environment: str) -> str:
        """What `command` prints; it must end well."""
        result = subprocess.run(
            self._on_this_host(command), env=self._environment(environment), cwd=REPOSITORY, capture_output=True,
            text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert result.returncode == 0, f"{' '.join(map(str, command))}:\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def processes(self, program: str = "") -> list[int]:
        """All of them but the first; or those whose command line contains `program`."""
        return [pid for pid in _pids() if self._has(pid) and program.encode() in _read(pid, "cmdline")]

    def end_processes(self, program: str = "") -> int:
        """SIGKILL for all, or those of `program`, in no order; how many there were."""
        found = self.processes(program)
        for pid in found:
            _signal(pid, signal.SIGKILL)
        return len(found)

    def entrances(self) -> list[int]:
        """The `nsenter`s, outside, that wait for a process here. They stop themselves when it is stopped."""
        beginning = "\0".join(self._enter()[:2]).encode()
        return [pid for pid in _pids() if _read(pid, "cmdline").startswith(beginning)]

    def kill(self) -> None:
        """The power goes: no process is asked, and no connection is closed, as the kernel would do for processes that
        are killed: the link goes first. `boot` brings the host back."""
        self.usual_speed()
        if self._unshare is not None:
            if self._init:
                subprocess.run(["ip", "link", "del", self._link])
                _signal(self._init, signal.SIGKILL)
            else:  # it did not boot
                self._unshare.kill()
            self._unshare.wait()
            self._unshare, self._init = None, 0
        while self.end_processes():
            time.sleep(0.05)

    @property
    def is_up(self) -> bool:
        return not self.in_namespaces or self._unshare is not None

    def cut(self) -> None:
        """Pull the cable: nothing is told to either end."""
        _ip(f"link set {self._link} down")

    def heal(self) -> None:
        _ip(f"link set {self._link} up")

    def slow(self, *, share: float, rate: str) -> None:
        """Until `usual_speed`: its processes may run for `share` of the time, its link carries `rate` at most."""
        if self.in_namespaces:
            for enter, device in (((), self._link), (self._enter("--net"), "eth0")):
                shape = f"tc qdisc add dev {device} root tbf rate {rate} burst 64kb latency 500ms"
                subprocess.run([*enter, *shape.split()], check=True)
                self._slowness.callback(subprocess.run, [*enter, *f"tc qdisc del dev {device} root".split()])
        self._slowness.enter_context(_held_back(self, share))

    def usual_speed(self) -> None:
        self._slowness.close()

    @property
    def _link(self) -> str:
        return f"host{self.number}"

    def _enter(self, *namespaces: str) -> tuple[str, ...]:
        return ("nsenter", f"--target={self._init}", *namespaces, "--")

    def _on_this_host(self, command: Sequence[object]) -> list[str]:
        words = list(map(str, command))
        if not self.in_namespaces:
            return words
        enter = self._enter("--net", "--mount", "--uts", "--pid")
        return [*enter, "bash", "-c", 'cd "$0" && exec "$@"', str(REPOSITORY), *words]

    def _environment(self, values: Mapping[str, str]) -> dict[str, str]:
        folder = "/tmp" if self.in_namespaces else str(self.disk)
        ours = {"HOME": f"{folder}/home", "TMPDIR": folder, "RAY_TMPDIR": folder, _OF_HOST: self.address}
        return {**self.environment, **ours, **values}

    def _has(self, pid: int) -> bool:
        if not self.in_namespaces:
            return f"{_OF_HOST}={self.address}".encode() in _read(pid, "environ").split(b"\0")
        try:
            same = os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self._init}/ns/pid")
        except OSError:  # it has ended
            return False
        return same and pid != self._init


@contextmanager
def hosts(names: Sequence[str], folder: Path, *, environment: Mapping[str, str]) -> Iterator[dict[str, Host]]:
    """Hosts of these names, up, for the block; `folder` gets their disks and the storage that they share.

    In the shared storage `small` is a disk of its own, of `SMALL_DISK_BYTES`.
    """
    in_namespaces = IN_NAMESPACES in os.environ
    shared = folder / "shared"
    (shared / "small").mkdir(parents=True)
    network = "10.77.0" if in_namespaces else "127.77.0"
    disks = folder if in_namespaces else Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: sockets are in it
    addresses = {f"{network}.{number}": name for number, name in enumerate(names, 1)}
    made = {
        name: Host(name, address, disks / name, shared, addresses, dict(environment), number, in_namespaces)
        for number, (address, name) in enumerate(addresses.items(), 1)
    }
    with ExitStack() as stack:
        if in_namespaces:
            _ip("link set lo up")
            _ip("link add bridge type bridge")
            stack.callback(_ip, "link del bridge")
            _ip(f"addr add {network}.254/24 dev bridge")
            _ip("link set bridge up")
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "none", shared / "small"], check=True
            )
            stack.callback(lambda: subprocess.run(["umount", shared / "small"]))
        else:
            stack.callback(shutil.rmtree, disks, ignore_errors=True)
        for host in made.values():
            stack.callback(host.kill)
            host.boot()
        yield made


@contextmanager
def _held_back(host: Host, share: float, period_s: float = 0.1) -> Iterator[None]:
    """The host's processes stand still for all but `share` of each period."""
    is_over = threading.Event()

    def hold_back() -> None:
        while not is_over.is_set():
            found = host.processes()
            for pid in found:
                _signal(pid, signal.SIGSTOP)
            time.sleep(period_s * (1 - share))
            for pid in [*found, *host.entrances()]:
                _signal(pid, signal.SIGCONT)
            is_over.wait(period_s * share)

    thread = threading.Thread(target=hold_back, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def fill(file: Path) -> None:
    """Take what the file's disk has left."""
    with file.open("wb", buffering=0) as stream:
        for size in (2**20, 4096):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # it has ended, or is another's
        return b""


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)
