"""Hostfiles and filters: read as DeepSpeed reads them, or refused with where and why."""

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
from hypothesis import example, given
from hypothesis import strategies as st

from ds_moe_ep.errors import HostfileError
from ds_moe_ep.hostfile import (
    Cluster,
    Host,
    filter_cluster,
    first_slots,
    local_cluster,
    parse_hostfile,
    read_hostfile,
)

_EIGHT_BY_EIGHT = "".join(f"worker-{i} slots=8\n" for i in range(8))
_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all that a UTF-8 file can hold
_NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,11}", fullmatch=True)
_POOLS = st.dictionaries(_NAMES, st.integers(1, 16), min_size=1, max_size=6)


def _pool(cluster: Cluster) -> dict[str, list[int]]:
    return {host.name: list(host.slots) for host in cluster.hosts}


def _deepspeed_pool(text: str, folder) -> dict[str, int] | None:
    """What DeepSpeed's launcher makes of a hostfile; None if it refuses."""
    path = folder / "hostfile"
    path.write_bytes(text.encode())
    try:
        return dict(fetch_hostfile(str(path)))
    except ValueError:
        return None


def _deepspeed_filtered(pool, include, exclude) -> dict[str, list[int]] | None:
    try:
        return dict(parse_inclusion_exclusion(pool, include, exclude))
    except ValueError:
        return None


def _hostfile(pool: dict[str, int]) -> str:
    return "".join(f"{name} slots={num_slots}\n" for name, num_slots in pool.items())


# Reading


@pytest.mark.parametrize(
    "text",
    [
        _EIGHT_BY_EIGHT,
        "worker-0 slots=4",
        "  worker-0   slots=4  \n\tworker-1\tslots=2\r\n",
        "# two hosts\n\nworker-0 slots=8\n   # the small one\nworker-1 slots=2\n\n",
        "worker-0 slots=8 # the first\nworker-1 slots=8 max_slots=8\n",
        "10.0.0.1 slots=1\nfe80::2%eth0 slots=1\nroot@host.example.org slots=1\n",
        "worker-0 slots=08\r",
        "slots=3 slots=4\n",
    ],
)
def test_reads_what_deepspeed_reads(text, tmp_path):
    expected = _deepspeed_pool(text, tmp_path)

    cluster = read_hostfile(tmp_path / "hostfile")

    assert expected is not None
    assert _pool(cluster) == {name: list(range(n)) for name, n in expected.items()}
    assert [host.name for host in cluster.hosts] == list(expected)


@given(
    text=_TEXT | st.lists(st.sampled_from([*"ab#=1- \t\r\n", "slots=", "slots=2\n"])).map("".join)
)
@example(text="a slots=1\x1cb")
@example(text="a slots=" + "9" * 5000)
@example(text="\ufeffa slots=1")
@example(text="a slots=1\rb slots=2")
def test_any_text_is_read_as_deepspeed_does_or_refused(text, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    try:
        cluster = parse_hostfile(text, "hostfile")
    except HostfileError:
        return
    assert {name: len(slots) for name, slots in _pool(cluster).items()} == _deepspeed_pool(
        text, folder
    )


@given(_POOLS)
def test_a_written_hostfile_is_read_back(pool):
    cluster = parse_hostfile(_hostfile(pool), "hostfile")

    assert parse_hostfile(cluster.to_hostfile(), "hostfile") == cluster
    assert cluster.include_filter == ""
    assert cluster.num_gpus == sum(pool.values())


def test_ranks_follow_hosts_then_slots():
    cluster = Cluster((Host("a", (0, 2)), Host("b", (1,))), "hostfile")

    assert [cluster.locate(rank) for rank in range(3)] == [("a", 0), ("a", 2), ("b", 1)]
    for rank in (-1, 3):
        with pytest.raises(IndexError, match=f"rank {rank}"):
            cluster.locate(rank)


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (parse_hostfile(_EIGHT_BY_EIGHT, "hostfile.8x8"), "8 hosts x 8 slots, hostfile.8x8"),
        (local_cluster(1), "1 host x 1 slot, local machine"),
        (parse_hostfile("a slots=1\nb slots=2", "h"), "2 hosts, 3 slots, h"),
    ],
)
def test_describes_itself(cluster, expected):
    assert cluster.describe() == expected


def test_the_local_machine_is_one_host():
    assert local_cluster(3).hosts == (Host("localhost", (0, 1, 2)),)
    with pytest.raises(HostfileError, match="num_slots=0 on the local machine: at least 1"):
        local_cluster(0)


# Refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a slots=2\n\na slots=4\n",
            "h:3: host 'a' is listed twice (first on line 1). Keep one line",
        ),
        ("a slots=2\nb\n", "h:2: 'b' has no slots=N after the host name. Write one host a line"),
        ("a 8\n", "h:1: 'a 8' has no slots=N"),
        ("a slots=\n", "h:1: 'a slots=' has slots=, which is not a positive whole number"),
        (
            "a slots=0\n",
            "h:1: 'a slots=0' has slots=0. Give the number of GPUs, or remove the host",
        ),
        ("a slots=-4\n", "has slots=-4, which is not a positive whole number"),
        ("# c\na slots=8.5\n", "h:2: 'a slots=8.5' has slots=8.5, which is not a positive whole"),
        ("a slots=eight\n", "has slots=eight, which is not a positive whole number"),
        ("a slots=8x\n", "has slots=8x, which is not a positive whole number"),
        ("a slots = 8\n", "h:1: 'a slots = 8' has no slots=N"),
        ("a b slots=8\n", "'a b slots=8' has text between the host name and slots=N"),
        ("slots=8\n", "h:1: 'slots=8' has no slots=N after the host name"),
        ("a slots=5000\n", "h:1: 'a slots=5000' has more than 4096 slots. Give the number of GPUs"),
        (
            "\ufeffa slots=8\n",
            r"host name '\ufeffa' has invisible characters. Save the file as UTF-8",
        ),
        (
            "-oProxyCommand=reboot slots=8\n",
            "h:1: host name '-oProxyCommand=reboot' begins with '-', so ssh and pdsh would take",
        ),
        ("a" * 90 + "\n", "h:1: '" + "a" * 57 + "...' has no slots=N"),
        ("", "h: no host in this hostfile. Write one host a line, like: worker-0 slots=8"),
        ("# nothing\n\n", "h: no host in this hostfile"),
    ],
)
def test_refuses_with_line_text_and_way_out(text, message):
    with pytest.raises(HostfileError) as refused:
        parse_hostfile(text, "h")
    assert message in str(refused.value)


def test_refuses_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"worker-0 slots=8\n\xff\xfe")
    for name, message in [
        (
            "missing",
            "missing: cannot be read (No such file or directory). Name an existing hostfile",
        ),
        (".", "cannot be read (Is a directory)"),
        ("binary", "binary: not UTF-8 text (byte 17). Write one host a line"),
    ]:
        with pytest.raises(HostfileError) as refused:
            read_hostfile(f"{tmp_path}/{name}")
        assert message in str(refused.value)


# Include and exclude

_FILTERS = [
    "worker-1",
    "worker-0@worker-1:0,2",
    "worker-1:3@worker-0:7,0,7",
    "worker-1:0@worker-1:1",
    "worker-1@worker-1:1",
    "worker-0@worker-0",
    "worker-0: 1, 2",
]


@pytest.mark.parametrize("text", _FILTERS)
@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_filters_as_deepspeed_does(text, flag):
    pool = {"worker-0": 8, "worker-1": 4}
    expected = _deepspeed_filtered(pool, *((text, "") if flag == "include" else ("", text)))
    assert expected is not None
    cluster = parse_hostfile(_hostfile(pool), "h")

    if expected:
        assert _pool(filter_cluster(cluster, **{flag: text})) == expected
    else:
        with pytest.raises(HostfileError, match="leaves none of the 12 slots of h"):
            filter_cluster(cluster, **{flag: text})


@given(
    pool=_POOLS,
    data=st.data(),
    flag=st.sampled_from(["include", "exclude"]),
)
def test_any_filter_is_read_as_deepspeed_does_or_refused_as_there(pool, data, flag):
    slots = st.lists(st.integers(-1, 17).map(str), max_size=3).map(
        lambda s: ":" * bool(s) + ",".join(s)
    )
    names = st.sampled_from([*pool, "nobody"])
    parts = st.tuples(names, slots).map("".join)
    text = data.draw(st.lists(parts, min_size=1, max_size=3).map("@".join))
    expected = _deepspeed_filtered(pool, *((text, "") if flag == "include" else ("", text)))
    cluster = parse_hostfile(_hostfile(pool), "h")

    try:
        filtered = filter_cluster(cluster, **{flag: text})
    except HostfileError:
        assert not expected  # refused there too, or nothing left
        return
    assert _pool(filtered) == expected
    # What is left can be given to DeepSpeed again.
    again = parse_hostfile(filtered.to_hostfile(), "h")
    assert filter_cluster(again, include=filtered.include_filter).hosts == filtered.hosts


def test_reads_and_filters_in_one_call(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(_EIGHT_BY_EIGHT)

    cluster = read_hostfile(path, include="worker-3:1,2")

    assert cluster.hosts == (Host("worker-3", (1, 2)),)
    assert cluster.source == f"{path} --include worker-3:1,2"
    assert read_hostfile(path, exclude="worker-3").num_gpus == 56


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (
            "worker-9",
            "",
            "--include 'worker-9' names host 'worker-9', which is not in h. Its hosts are",
        ),
        ("", "worker-0@", "--exclude 'worker-0@' names host '', which is not in h"),
        ("worker-0:8", "", "names slot '8' of host 'worker-0', which has slots 0 to 7"),
        ("worker-0:", "", "names slot '' of host 'worker-0'"),
        ("worker-0:a", "", "names slot 'a' of host 'worker-0'"),
        ("worker-0:0:1", "", "names slot '0:1' of host 'worker-0'"),
        ("worker-0:-1", "", "names slot '-1' of host 'worker-0'"),
        (
            "worker-0",
            "worker-1",
            "--include 'worker-0' and --exclude 'worker-1' exclude each other",
        ),
    ],
)
def test_refuses_a_filter_that_names_what_is_not_there(include, exclude, message):
    with pytest.raises(HostfileError) as refused:
        filter_cluster(parse_hostfile(_EIGHT_BY_EIGHT, "h"), include=include, exclude=exclude)
    assert message in str(refused.value)


def test_first_slots_are_those_of_the_lowest_ranks():
    cluster = parse_hostfile("a slots=2\nb slots=3\nc slots=1\n", "f")
    assert first_slots(cluster, 1).hosts == (Host("a", (0,)),)
    assert first_slots(cluster, 4).hosts == (Host("a", (0, 1)), Host("b", (0, 1)))
    assert first_slots(cluster, 6).hosts == cluster.hosts


@pytest.mark.parametrize("num_slots", [0, 7])
def test_more_slots_than_there_are_or_none_are_refused(num_slots):
    cluster = parse_hostfile("a slots=2\nb slots=4\n", "f")
    with pytest.raises(HostfileError, match=f"{num_slots} ranks are asked for.*Ask for 1 to 6"):
        first_slots(cluster, num_slots)


@pytest.mark.parametrize("name", ["root@worker", "fe80::2%eth0"])
def test_a_host_that_a_filter_cannot_name_takes_part_with_all_slots_or_is_refused(name):
    whole = Cluster((Host(name, (0, 1)),), "hostfile")
    assert whole.include_filter == ""
    with pytest.raises(HostfileError, match=f"^{name}: DeepSpeed takes --include and --exclude"):
        _ = Cluster((Host(name, (0, 2)),), "hostfile").include_filter
