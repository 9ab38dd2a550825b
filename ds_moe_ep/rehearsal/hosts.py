"""Makes the hosts of a hostfile on this machine: network namespaces with a name and an sshd each.

DeepSpeed's launcher, pdsh and ssh find them as they would find real ones. They share this machine's
files, cores and memory, and reach each other, but nothing else.

Nothing of the hosts is left behind, however this process ends: they live in namespaces of one
process that waits for the end of its input. With that process the kernel ends all others there, and
with the last of them go the networks, the mounts over ``/run``, files of ``/etc`` and ssh's
configuration, and the files on them. The machine's own are never written. A command that is run
where the hosts can be reached is no process of theirs: who starts it ends it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.errors import ConfigError, DistributedError, HostfileError
from ds_moe_ep.host_memory import proportional_bytes
from ds_moe_ep.hostfile import Cluster

__all__ = ["INTERFACE", "SimulatedHosts", "memory_bytes", "simulate_hosts", "why_no_hosts"]

INTERFACE = "eth0"
"""The network interface of every host."""

# Debian's package of each command.
_PACKAGES = {"pdsh": "pdsh", "sshd": "openssh-server", "ip": "iproute2", "unshare": "util-linux"}
_SSHD = "/usr/sbin/sshd"  # sshd wants to be called by its whole path
_NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child")
# Tells its pid as this machine counts, and stays until its input ends.
_KEEPER = "read -r pid rest < /proc/self/stat; echo $pid; exec cat > /dev/null"
_START_S = 60.0
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")

# One key pair serves all: the hosts prove themselves with it, and whoever comes to them.
_SSHD_CONFIG = """\
HostKey /run/key
AuthorizedKeysFile /run/key.pub
StrictModes no
PasswordAuthentication no
UsePAM no
UseDNS no
PidFile none
MaxStartups 1000
"""
# Names from files alone: there is nobody to ask, and to find that out takes seconds.
_NSSWITCH = """\
passwd: files
group: files
shadow: files
hosts: files
"""
_SSH_CONFIG = """\
User root
IdentityFile /run/key
IdentitiesOnly yes
GlobalKnownHostsFile /run/known_hosts
ConnectionAttempts 30
LogLevel ERROR
"""


@dataclass(frozen=True)
class SimulatedHosts:
    """Hosts that are there until `simulate_hosts` is left.

    Attributes:
        addresses: IPv4 address of each host, by its name.
        variables: Environment variables of `command` and, by ``DS_ENV_FILE``, of every rank that
            DeepSpeed's launcher starts from there.
    """

    addresses: Mapping[str, str]
    variables: Mapping[str, str]
    _keeper_pid: int

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """Returns what runs a command where the hosts can be reached, in this folder.

        It runs as the process that is started, which gets its signals and gives its exit code.
        """
        settings = [f"{name}={value}" for name, value in self.variables.items()]
        inside = ["env", f"--chdir={os.getcwd()}", "DS_ENV_FILE=/run/ds_env", *settings]
        return [*self._enter("--mount", "--net"), *inside, *map(str, argv)]

    def cut_off(self, host: str) -> None:
        """Takes down the link of a host, as a broken cable would."""
        number = list(self.addresses).index(host)
        _run([*self._enter("--mount", "--net"), "ip", "link", "set", f"veth{number}", "down"])

    def memory_bytes(self) -> int:
        """Returns what all processes of the hosts take together; shared pages count once."""
        own = os.readlink(f"/proc/{self._keeper_pid}/ns/pid")
        return memory_bytes(lambda pid: os.readlink(f"/proc/{pid}/ns/pid") == own)

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self._keeper_pid}", *namespaces, "--"]


def memory_bytes(is_counted: Callable[[int], bool]) -> int:
    """Returns what some processes of this machine take together; pages they share count once.

    Args:
        is_counted: Says of a process whether it is one of them.
    """
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        with contextlib.suppress(OSError):  # it may end meanwhile, or be another user's
            if is_counted(pid):
                total += proportional_bytes(pid) or 0
    return total


def why_no_hosts() -> str | None:
    """Returns why hosts cannot be made on this machine and what to do; None if they can."""
    why = _what_is_in_the_way()
    if why is None:
        return None
    packages = " ".join(_PACKAGES.values())
    return f"{why}. Hosts take root and, on Debian: apt-get install -y {packages}."


def _what_is_in_the_way() -> str | None:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    missing = [name for name in _PACKAGES if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    if os.geteuid() != 0:
        return "hosts are made of network namespaces, and this is not root"
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return (
            f"this machine makes no namespaces ({tried.stderr.strip()}): a container needs "
            "--privileged, or at least CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    return None


@contextlib.contextmanager
def simulate_hosts(
    cluster: Cluster, variables: Mapping[str, str] | None = None
) -> Iterator[SimulatedHosts]:
    """Makes the hosts of a cluster, and removes them at the end.

    Args:
        cluster: Its hosts, by name or by IPv4 address; their slots do not matter.
        variables: More environment variables for what is run there.

    Yields:
        The hosts, reachable by ssh from each other and from `SimulatedHosts.command`.

    Raises:
        ConfigError: This machine cannot make them.
        HostfileError: A name is not one of a host.
        DistributedError: A host did not come up.
    """
    addresses = _addresses(cluster)
    if reason := why_no_hosts():
        raise ConfigError(f"{cluster.source}: {reason}")
    variables = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "HF_HUB_OFFLINE": "1",
        **(variables or {}),
    }
    with subprocess.Popen(
        [*_NAMESPACES, "sh", "-c", _KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the commands, not for the hosts
    ) as keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        try:
            hosts = SimulatedHosts(addresses, variables, int(keeper.stdout.readline()))
            _write_files(hosts)
            _connect(hosts)
            _start(hosts)
            yield hosts
        finally:
            keeper.stdin.close()


def _addresses(cluster: Cluster) -> dict[str, str]:
    addresses = {}
    for number, host in enumerate(cluster.hosts):
        address = _ipv4(host.name)
        is_own = host.name == "localhost" or (address is not None and address.is_loopback)
        if is_own or not _HOST_NAME.fullmatch(host.name):
            raise HostfileError(
                f"{cluster.source}: host {host.name!r} cannot be made on this machine. Use names "
                "of letters, digits, '-' and '.', other than localhost, or IPv4 addresses."
            )
        own = f"10.{64 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
        addresses[host.name] = own if address is None else host.name
    return addresses


def _ipv4(name: str) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(name)
    except ValueError:
        return None


def _write_files(hosts: SimulatedHosts) -> None:
    """Puts ssh's and DeepSpeed's files, and the hosts' names, where only these namespaces see."""
    enter = hosts._enter("--mount")
    _run([*enter, "mount", "-t", "tmpfs", "tmpfs", "/run"])
    _run([*enter, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/key"])
    run = Path(f"/proc/{hosts._keeper_pid}/root/run")
    (run / "sshd").mkdir()  # where sshd locks its helpers up
    # The second form is what a socket that speaks IPv6 too calls its peer.
    names = "".join(
        f"{address} {name}\n::ffff:{address} {name}\n" for name, address in hosts.addresses.items()
    )
    (run / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    (run / "known_hosts").write_text(f"* {(run / 'key.pub').read_text()}")
    (run / "sshd_config").write_text(_SSHD_CONFIG)
    (run / "ssh_config").write_text(_SSH_CONFIG)
    (run / "ds_env").write_text("".join(f"{k}={v}\n" for k, v in hosts.variables.items()))
    (run / "nsswitch.conf").write_text(_NSSWITCH)
    places = ["/etc/hosts", "/etc/nsswitch.conf", "/etc/ssh/ssh_config"]
    with contextlib.suppress(FileNotFoundError):
        (run / "shadow").write_text(_unlocked(Path("/etc/shadow").read_text()))
        (run / "shadow").chmod(0o600)
        places.append("/etc/shadow")
    for place in places:
        _run([*enter, "mount", "--bind", f"/run/{Path(place).name}", place])
    own = Path.home() / ".ssh"
    if own.is_dir():  # its settings would go before ours
        _run([*enter, "mount", "-t", "tmpfs", "tmpfs", str(own)])


def _unlocked(shadow: str) -> str:
    """Returns /etc/shadow with a root that has no password: sshd lets no locked account in."""
    return re.sub(r"^root:[^:]*:", "root:*:", shadow, flags=re.MULTILINE)


def _connect(hosts: SimulatedHosts) -> None:
    """Gives each host a cable to one bridge, where this machine's end of the network is too."""
    enter = hosts._enter("--mount", "--net")
    lines = ["link set lo up", "link add bridge type bridge", "link set bridge up"]
    lines += ["address add 10.127.255.254/32 dev bridge", "route add default dev bridge"]
    for number in range(len(hosts.addresses)):
        lines += [
            f"netns add host{number}",
            f"link add veth{number} type veth peer name {INTERFACE} netns host{number}",
            f"link set veth{number} master bridge up",
        ]
    _run([*enter, "ip", "-batch", "-"], text="\n".join(lines))
    for number, address in enumerate(hosts.addresses.values()):
        lines = ["link set lo up", f"address add {address}/32 dev {INTERFACE}"]
        lines += [f"link set {INTERFACE} up", f"route add default dev {INTERFACE}"]
        _run([*enter, "ip", "-netns", f"host{number}", "-batch", "-"], text="\n".join(lines))


def _start(hosts: SimulatedHosts) -> None:
    """Starts every host's sshd and waits until each answers by its name."""
    start = f'hostname "$1" && exec {_SSHD} -f /run/sshd_config'
    for number, name in enumerate(hosts.addresses):
        within = ["ip", "netns", "exec", f"host{number}", "unshare", "--uts", "--mount-proc"]
        enter = hosts._enter("--mount", "--net", "--pid")
        _run([*enter, *within, "sh", "-c", start, "sh", name])
    for name in hosts.addresses:
        answer = _run(hosts.command(["ssh", name, "hostname"])).strip()
        if answer != name:
            raise DistributedError(f"host {name} answers as {answer!r}.")


def _run(argv: Sequence[str], text: str = "") -> str:
    """Runs a step of the set-up and returns what it prints."""
    try:
        ended = subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=_START_S, check=True
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip()
    except subprocess.TimeoutExpired:
        reason = f"not done in {_START_S:.0f} s"
    else:
        return ended.stdout
    raise DistributedError(f"hosts cannot be made here: {' '.join(argv)}: {reason}")
