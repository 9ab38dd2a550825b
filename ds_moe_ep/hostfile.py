"""Reads DeepSpeed hostfiles and `--include`/`--exclude` filters, in DeepSpeed's grammar.

It knows hosts and slots only; which rank does what is decided in plan.py and placement.py.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.errors import HostfileError

__all__ = [
    "Cluster",
    "Host",
    "filter_cluster",
    "first_slots",
    "local_cluster",
    "parse_hostfile",
    "read_hostfile",
]

MAX_SLOTS_PER_HOST = 4096
_ENTRY = re.compile(r"(\S+)\s+slots=(\d+)(?=\s|#|$)")
_EXAMPLE = "Write one host a line, like: worker-0 slots=8"


@dataclass(frozen=True)
class Host:
    """One machine and the numbers of its slots (GPUs) that take part."""

    name: str
    slots: tuple[int, ...]

    @property
    def slot_filter(self) -> str:
        """The host and its slots as `--include` spells them: "worker-0:0,2"."""
        return f"{self.name}:{','.join(map(str, self.slots))}"


@dataclass(frozen=True)
class Cluster:
    """The hosts of a job in rank order; `source` says where they were read from."""

    hosts: tuple[Host, ...]
    source: str

    @property
    def num_gpus(self) -> int:
        """Number of slots over all hosts."""
        return sum(len(host.slots) for host in self.hosts)

    @property
    def is_local(self) -> bool:
        """Whether it is this machine alone, called localhost: nothing goes through ssh then."""
        return [host.name for host in self.hosts] == ["localhost"]

    @property
    def include_filter(self) -> str:
        """The `--include` text needed next to `to_hostfile()`; empty if all slots take part.

        Raises:
            HostfileError: as `spell_out`.
        """
        if all(host.slots == tuple(range(len(host.slots))) for host in self.hosts):
            return ""
        return self.spell_out()

    def spell_out(self) -> str:
        """Return the `--include` text that names every host and slot.

        Raises:
            HostfileError: if DeepSpeed cannot tell a name from what is around it there.
        """
        for host in self.hosts:
            if set(host.name) & set("@:"):
                raise HostfileError(
                    f"{host.name}: DeepSpeed takes --include and --exclude apart at '@' and ':'. "
                    "Name hosts without them (user and address in ~/.ssh/config), or use all slots "
                    "of all hosts."
                )
        return "@".join(host.slot_filter for host in self.hosts)

    def describe(self) -> str:
        """Return hosts, slots and source for messages: "8 hosts x 8 slots, hostfile.8x8"."""
        counts = {len(host.slots) for host in self.hosts}
        hosts = "1 host" if len(self.hosts) == 1 else f"{len(self.hosts)} hosts"
        if len(counts) > 1:
            slots = f", {self.num_gpus} slots"
        else:
            slots = " x 1 slot" if counts == {1} else f" x {counts.pop()} slots"
        return f"{hosts}{slots}, {self.source}"

    def locate(self, rank: int) -> tuple[str, int]:
        """Return (host name, slot) of a rank; ranks follow the hosts' order, then the slots'.

        Raises:
            IndexError: if there is no such rank.
        """
        if rank < 0:
            raise IndexError(f"rank {rank} is negative")
        first = 0
        for host in self.hosts:
            if rank < first + len(host.slots):
                return host.name, host.slots[rank - first]
            first += len(host.slots)
        raise IndexError(f"rank {rank} is not one of {first} ranks")

    def to_hostfile(self) -> str:
        """Return a DeepSpeed hostfile of these hosts.

        It can only say "slots 0 to N-1"; where fewer take part, `include_filter` says which.
        """
        return "".join(f"{host.name} slots={max(host.slots) + 1}\n" for host in self.hosts)


def local_cluster(num_slots: int, slots: tuple[int, ...] = ()) -> Cluster:
    """Return this machine as a cluster of one host, "localhost".

    Args:
        num_slots: how many of its slots take part.
        slots: which; by default the first.

    Raises:
        HostfileError: if num_slots is not positive.
    """
    if num_slots < 1:
        raise HostfileError(f"num_slots={num_slots} on the local machine: at least 1 is needed.")
    return Cluster((Host("localhost", slots or tuple(range(num_slots))),), "local machine")


def read_hostfile(path: str | Path, *, include: str = "", exclude: str = "") -> Cluster:
    """Read a hostfile and keep the slots that an include or exclude text leaves.

    Args:
        path: the hostfile.
        include: DeepSpeed's `--include` text, `host1@host2:0,2`: only these slots, all of host1's.
        exclude: DeepSpeed's `--exclude` text, in the same form: all but these slots.

    Raises:
        HostfileError: if the file cannot be read or used, or the filter names what is not in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HostfileError(f"{path}: not UTF-8 text (byte {error.start}). {_EXAMPLE}") from None
    except OSError as error:
        raise HostfileError(
            f"{path}: cannot be read ({error.strerror}). Name an existing hostfile, or none to "
            "plan for this machine."
        ) from None
    return filter_cluster(parse_hostfile(text, str(path)), include=include, exclude=exclude)


def parse_hostfile(text: str, source: str) -> Cluster:
    """Parse the text of a hostfile: `name slots=N` a line, `#` comment lines and blank lines.

    As in DeepSpeed's launcher, text after the slots is ignored. Unlike there, `slots=0` and
    `slots=8.5` are refused.

    Args:
        text: content of the file.
        source: path for messages.

    Raises:
        HostfileError: with `source:line`, the offending text and what to write.
    """
    slots_by_host: dict[str, int] = {}
    first_line: dict[str, int] = {}
    for number, raw in enumerate(io.StringIO(text, newline=None), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{source}:{number}"
        name, num_slots = _parse_entry(line, where)
        if name in first_line:
            raise HostfileError(
                f"{where}: host {name!r} is listed twice (first on line {first_line[name]}). Keep "
                "one line for it, with all of its slots."
            )
        slots_by_host[name] = num_slots
        first_line[name] = number
    if not slots_by_host:
        raise HostfileError(f"{source}: no host in this hostfile. {_EXAMPLE}")
    return Cluster(tuple(Host(name, tuple(range(n))) for name, n in slots_by_host.items()), source)


def _parse_entry(line: str, where: str) -> tuple[str, int]:
    match = _ENTRY.match(line)
    if match is None:
        raise HostfileError(f"{where}: {_shown(line)} {_why_not_an_entry(line)}. {_EXAMPLE}")
    name, digits = match.groups()
    if not name.isprintable():
        raise HostfileError(
            f"{where}: host name {_shown(name)} has invisible characters. Save the file as UTF-8 "
            "without a byte order mark."
        )
    if name.startswith("-"):
        raise HostfileError(
            f"{where}: host name {_shown(name)} begins with '-', so ssh and pdsh would take it for "
            "an option. Give the host another name."
        )
    num_slots = int(digits) if len(digits) < 10 else MAX_SLOTS_PER_HOST + 1
    if num_slots == 0:
        raise HostfileError(
            f"{where}: {_shown(line)} has slots=0. Give the number of GPUs, or remove the host."
        )
    if num_slots > MAX_SLOTS_PER_HOST:
        raise HostfileError(
            f"{where}: {_shown(line)} has more than {MAX_SLOTS_PER_HOST} slots. Give the number of "
            "GPUs of that host."
        )
    return name, num_slots


def _why_not_an_entry(line: str) -> str:
    words = line.split()
    value = next((word[len("slots=") :] for word in words[1:] if word.startswith("slots=")), None)
    if value is None:
        return "has no slots=N after the host name"
    if words[1] != f"slots={value}":
        return "has text between the host name and slots=N"
    return f"has slots={value[:20]}, which is not a positive whole number"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def filter_cluster(cluster: Cluster, *, include: str = "", exclude: str = "") -> Cluster:
    """Keep the slots that an include or exclude text leaves; see `read_hostfile`.

    Raises:
        HostfileError: if both texts are given, or one names what is not there or leaves nothing.
    """
    if include and exclude:
        raise HostfileError(
            f"--include {include!r} and --exclude {exclude!r} exclude each other. Use one of them."
        )
    if not include and not exclude:
        return cluster
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    chosen = _parse_filter(text, flag, cluster)
    kept = []
    for host in cluster.hosts:
        named = chosen.get(host.name, ())
        slots = tuple(slot for slot in host.slots if (slot in named) == bool(include))
        if slots:
            kept.append(Host(host.name, slots))
    if not kept:
        raise HostfileError(
            f"{flag} {text!r} leaves none of the {cluster.num_gpus} slots of {cluster.source}. "
            "Leave at least one."
        )
    return Cluster(tuple(kept), f"{cluster.source} {flag} {text}")


def first_slots(cluster: Cluster, num_slots: int) -> Cluster:
    """Keep as many slots, those of the lowest ranks.

    Raises:
        HostfileError: if there are not so many.
    """
    if not 1 <= num_slots <= cluster.num_gpus:
        raise HostfileError(
            f"{num_slots} ranks are asked for, but {cluster.describe()}, has {cluster.num_gpus}. "
            f"Ask for 1 to {cluster.num_gpus}."
        )
    kept: list[Host] = []
    for host in cluster.hosts:
        if num_slots > 0:
            kept.append(Host(host.name, host.slots[:num_slots]))
        num_slots -= len(host.slots)
    return Cluster(tuple(kept), cluster.source)


def _parse_filter(text: str, flag: str, cluster: Cluster) -> dict[str, set[int]]:
    known = {host.name: host.slots for host in cluster.hosts}
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, slot_text = part.partition(":")
        if name not in known:
            raise HostfileError(
                f"{flag} {text!r} names host {name!r}, which is not in {cluster.source}. "
                f"Its hosts are {_listed(known)}."
            )
        slots = named.setdefault(name, set())
        for word in slot_text.split(",") if colon else ():
            if not re.fullmatch(r"\s*\d{1,9}\s*", word) or int(word) not in known[name]:
                raise HostfileError(
                    f"{flag} {text!r} names slot {word!r} of host {name!r}, which has slots 0 to "
                    f"{known[name][-1]}."
                )
            slots.add(int(word))
    # A host without slots means all of them, unless slots of it are named elsewhere in the text.
    return {name: slots or set(known[name]) for name, slots in named.items()}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", ... {len(names)} hosts" if len(names) > 8 else "")
