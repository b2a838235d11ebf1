"""The memory of every process on every host, again and again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.hosts import Host


class Memory:
    """Anonymous resident memory: what a process itself holds. Pages of files and of Ray's object store, which many
    processes share and the kernel may drop or Ray limits, are not in it."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        self._elapsed_s: list[float] = []
        self._programs: dict[tuple[str, int], str] = {}
        self._bytes: dict[tuple[str, int], list[int | None]] = {}

    @property
    def num_samples(self) -> int:
        return len(self._elapsed_s)

    def sample(self, elapsed_s: float) -> None:
        found = {(host.name, pid): _anonymous_bytes(pid) for host in self._hosts for pid in host.processes()}
        for process in found.keys() - self._bytes.keys():
            self._bytes[process] = [None] * self.num_samples
        for process, values in self._bytes.items():
            values.append(found.get(process))
            if process in found:
                self._programs[process] = _program(process[1]) or self._programs.get(process, "")
        self._elapsed_s.append(round(elapsed_s, 1))

    def series(self) -> dict[str, Any]:
        """`bytes` by process at `elapsed_s`, None where there was no such process."""
        named = {f"{host} {self._programs[host, pid]} {pid}": values for (host, pid), values in self._bytes.items()}
        return {"elapsed_s": self._elapsed_s, "bytes": dict(sorted(named.items()))}


def _anonymous_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields["RssAnon"].split()[0]) if "RssAnon" in fields else None


def _program(pid: int) -> str:
    """`ray::ServeReplica:pacos:generator`, or the file that is run."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    names = [word.decode(errors="replace") for word in words if word and not word.startswith(b"-")]
    if not names:
        return ""
    is_python = Path(names[0]).name.startswith("python") and len(names) > 1
    return Path(names[1] if is_python else names[0].split()[0]).name
