"""run.sh and run.sbatch, executed against stand-ins for ds-moe-ep, deepspeed, scontrol and srun."""

import os
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from ds_moe_ep.config.scripts import run_sbatch, run_sh
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster, Host, local_cluster, parse_hostfile

EIGHT = parse_hostfile("".join(f"worker-{i} slots=8\n" for i in range(8)), "hostfile")
IO = ["--input", "in.jsonl", "--output", "out.jsonl"]
NASTY = "a; rm -rf x $(touch pwned) `touch pwned` '\" @RANKS@"

FAKE_DEEPSPEED = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORD"
printf '%s\\0' "${PDSH_SSH_ARGS_APPEND-unset}" > "$RECORD.ssh"
"""
FAKE_SURVEY = """#!/usr/bin/env bash
printf '%s\\0' "$@" "${PDSH_SSH_ARGS_APPEND-unset}" > "$RECORD.survey"
"""
# Answers as Slurm's does: the job's script with its arguments, and the nodes of a list.
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show job 4242")
    printf 'JobId=4242 JobName=ds_moe_ep\\n   Priority=1\\n'
    printf '   Command=%s --input in.jsonl\\n   WorkDir=/somewhere\\n' "$SCRIPT" ;;
  "show hostnames node[3-10]") printf 'node%s\\n' 3 4 5 6 7 8 9 10 ;;
  *) exit 3 ;;
esac
"""
# Records its own options and runs the command as task 11, the fourth of the second node.
FAKE_SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do options+=("$1"); shift; done
printf '%s\\0' "${options[@]}" > "$RECORD.srun"
SLURM_PROCID=11 SLURM_LOCALID=3 exec "$@"
"""
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT" "$@" > "$RECORD"
"""
OF_KUBERNETES = {"MASTER_PORT": "tcp://10.0.0.1:29500"}  # for a service called master
NO_PORT = "MASTER_PORT=tcp://10.0.0.1:29500 is no port number. Unset it, or set it to a free port."


class Sandbox:
    """A folder with launch/infer.py, a bundle and stand-ins on the PATH."""

    def __init__(self, root: Path, bundle: str = "bundle"):
        self.root = root
        self.bundle = root / bundle
        self.record = root / "record"
        for folder in (self.bundle, root / "launch", root / "bin"):
            folder.mkdir(parents=True)
        (root / "launch" / "infer.py").touch()
        (self.bundle / "ds_inference.json").touch()
        commands = {
            "deepspeed": FAKE_DEEPSPEED,
            "ds-moe-ep": FAKE_SURVEY,
            "scontrol": FAKE_SCONTROL,
            "srun": FAKE_SRUN,
            "python": FAKE_PYTHON,
        }
        for name, text in commands.items():
            self._write(root / "bin" / name, text)

    @staticmethod
    def _write(path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, text: str, *args: str, at: str | None = None, **env: str):
        """Run a script as `at` (by default in the bundle) and return the finished process."""
        path = self._write(Path(at) if at else self.bundle / "script", text)
        base = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        base |= {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "RECORD": str(self.record)}
        return subprocess.run(
            [path, *args], cwd=self.root, env=base | env, capture_output=True, text=True, timeout=60
        )

    def recorded(self, suffix: str = "") -> list[str]:
        return Path(f"{self.record}{suffix}").read_text().split("\0")[:-1]

    def slurm(self, text: str, *args: str, **env: str):
        """Run a batch script as Slurm does: a copy of it, elsewhere."""
        slurm = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "64", "SLURM_JOB_NODELIST": "node[3-10]"}
        script = {"SCRIPT": str(self.bundle / "run.sbatch")}
        spool = self.root / "spool"
        spool.mkdir(exist_ok=True)
        return self.run(text, *args, at=str(spool / "slurm_script"), **(slurm | script | env))


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path / "work")


@pytest.fixture
def model(sandbox):
    folder = sandbox.root / "olmoe"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("make", [run_sh, run_sbatch])
@pytest.mark.parametrize("cluster", [EIGHT, local_cluster(1)], ids=["8x8", "local"])
def test_bash_accepts_the_syntax(make, cluster, tmp_path):
    for path in (tmp_path, tmp_path / "config.json", Path(NASTY)):
        checked = subprocess.run(["bash", "-n"], input=make(path, cluster), text=True, check=False)
        assert checked.returncode == 0


def test_run_sh_starts_deepspeed_over_pdsh(sandbox, model):
    done = sandbox.run(run_sh(model, EIGHT), *IO, "--batch-size", "8")
    assert (done.returncode, done.stderr) == (0, "")
    here = str(sandbox.bundle)
    assert sandbox.recorded() == [
        *["--hostfile", f"{here}/hostfile", "--launcher", "pdsh", "--master_port", "29500"],
        *["launch/infer.py", "--model", str(model), "--config", here],
        *[*IO, "--batch-size", "8"],
    ]


def test_run_sh_has_the_hosts_asked_before_it_starts_any(sandbox, model):
    sandbox.run(run_sh(model, EIGHT), *IO)
    asked = sandbox.recorded(".survey")
    assert asked == [
        *["preflight", "--hosts-only", "--quick", "--hostfile", f"{sandbox.bundle}/hostfile"],
        *["--model", str(model), "-oServerAliveInterval=5 -oServerAliveCountMax=3"],
    ]
    sandbox._write(sandbox.root / "bin" / "ds-moe-ep", "#!/bin/sh\nexit 2\n")
    sandbox.record.unlink()
    assert sandbox.run(run_sh(model, EIGHT), *IO).returncode == 2
    assert not sandbox.record.exists()
    assert sandbox.run(run_sh(model, EIGHT), *IO, SURVEY="no").returncode == 0
    assert sandbox.record.exists()


def test_only_the_hosts_that_are_used_are_asked(sandbox, model):
    cluster = Cluster((Host("a", (1, 3)), Host("c", (0,))), "hostfile")
    sandbox.run(run_sh(model, cluster), *IO)
    asked = sandbox.recorded(".survey")
    assert asked[asked.index("--include") + 1] == "a:1,3@c:0"


def test_this_machine_alone_is_not_asked(sandbox, model):
    sandbox.run(run_sh(model, local_cluster(4)), *IO)
    assert sandbox.record.exists() and not Path(f"{sandbox.record}.survey").exists()


def test_ssh_notices_a_host_that_is_cut_off_unless_the_user_has_options_for_it(sandbox, model):
    sandbox.run(run_sh(model, EIGHT), *IO)
    assert sandbox.recorded(".ssh") == ["-oServerAliveInterval=5 -oServerAliveCountMax=3"]
    for own in ("-p 2222", ""):
        sandbox.run(run_sh(model, EIGHT), *IO, PDSH_SSH_ARGS_APPEND=own)
        assert sandbox.recorded(".ssh") == [own]
    sandbox.run(run_sh(model, local_cluster(4)), *IO)
    assert sandbox.recorded(".ssh") == ["unset"]


def test_run_sh_finds_its_folder_whatever_cdpath_says(sandbox, model):
    relative = "bundle/script"
    sandbox.run(run_sh(model, EIGHT), *IO)
    env = {"PATH": f"{sandbox.root / 'bin'}:{os.environ['PATH']}", "CDPATH": "/:/tmp"}
    subprocess.run(
        [relative, *IO], cwd=sandbox.root, env=env | {"RECORD": str(sandbox.record)}, check=True
    )
    assert sandbox.recorded()[1] == f"{sandbox.bundle}/hostfile"


def test_model_and_infer_can_be_set_from_outside(sandbox, model):
    (sandbox.root / "other.py").touch()
    sandbox.run(run_sh(model, EIGHT), *IO, MODEL="allenai/OLMoE-1B-7B-0924", INFER="other.py")
    assert sandbox.recorded()[6:9] == ["other.py", "--model", "allenai/OLMoE-1B-7B-0924"]


@pytest.mark.parametrize("cluster", [EIGHT, local_cluster(4)], ids=["8x8", "local"])
def test_deepspeed_reads_the_port_that_run_sh_is_given(sandbox, model, cluster):
    from deepspeed.launcher.runner import parse_args

    for env, port in (({}, 29500), ({"MASTER_PORT": "29611"}, 29611)):
        sandbox.run(run_sh(model, cluster), *IO, **env)
        args = parse_args(sandbox.recorded())
        assert (args.master_port, args.user_script) == (port, "launch/infer.py")


def test_deepspeed_reads_the_address_that_run_sh_is_given(sandbox, model):
    from deepspeed.launcher.runner import parse_args

    for env, address in (({}, ""), ({"MASTER_ADDR": "10.0.0.7"}, "10.0.0.7")):
        sandbox.run(run_sh(model, EIGHT), *IO, **env)
        args = parse_args(sandbox.recorded())
        assert (args.master_addr, args.user_script) == (address, "launch/infer.py")


def test_run_sbatch_takes_another_port(sandbox, model):
    sandbox.slurm(run_sbatch(model, EIGHT), *IO, MASTER_PORT="29611")
    assert sandbox.recorded()[3:5] == ["node3", "29611"]


@pytest.mark.parametrize("cluster", [EIGHT, local_cluster(4)], ids=["8x8", "local"])
def test_run_sh_refuses_a_port_that_is_no_number_before_hosts_are_asked(sandbox, model, cluster):
    done = sandbox.run(run_sh(model, cluster), *IO, **OF_KUBERNETES)
    assert (done.returncode, done.stderr) == (2, f"run.sh: {NO_PORT}\n")
    assert not sandbox.record.exists() and not Path(f"{sandbox.record}.survey").exists()


@pytest.mark.parametrize("kind", ["run_sh", "run_sbatch"])
def test_a_bare_config_json_leaves_the_model_to_be_named(sandbox, tmp_path, kind):
    (tmp_path / "config.json").touch()
    if kind == "run_sh":
        text, run = run_sh(tmp_path / "config.json", EIGHT), sandbox.run
    else:
        text, run = run_sbatch(tmp_path / "config.json", EIGHT), sandbox.slurm
    assert str(tmp_path) not in text
    done = run(text, *IO)
    assert done.returncode != 0 and "set MODEL to the folder with config.json" in done.stderr
    assert run(text, *IO, MODEL="m").returncode == 0


def test_one_remote_host_is_not_replaced_by_this_machine(sandbox, model):
    sandbox.run(run_sh(model, parse_hostfile("worker-0 slots=8\n", "h")), *IO)
    assert sandbox.recorded()[2:5] == ["--launcher", "pdsh", "--force_multi"]


def test_this_machine_needs_no_ssh_and_may_have_any_name_in_a_path(tmp_path):
    sandbox = Sandbox(tmp_path / f"x {NASTY}".replace("/", ""), bundle="my bundle")
    done = sandbox.run(run_sh(Path(NASTY), local_cluster(4)), "--input", "a b;c.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert sandbox.recorded() == [
        *["--hostfile", f"{sandbox.bundle}/hostfile"],
        *["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", "29500"],
        *["launch/infer.py", "--model", NASTY, "--config", str(sandbox.bundle)],
        *["--input", "a b;c.jsonl"],
    ]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("word", [NASTY, "a b", "a;b", "$HOME", "~/x", "*", "%n", "a'b", ""])
def test_run_sh_refuses_what_other_hosts_would_not_get_unchanged(sandbox, model, word):
    done = sandbox.run(run_sh(model, EIGHT), "--input", word)
    assert done.returncode == 2 and "or run.sbatch" in done.stderr
    done = sandbox.run(run_sh(Path(word or "a b"), EIGHT), *IO)
    assert done.returncode == 2 and "or run.sbatch" in done.stderr
    assert not sandbox.record.exists() and not list(sandbox.root.rglob("pwned"))


def test_what_run_sh_lets_pass_survives_deepspeeds_pdsh_launcher(sandbox, model):
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    words = ["--input", "/a_B9/@x+y=z:1,2.3-4/i.jsonl", "--temperature=0.5"]
    assert sandbox.run(run_sh(model, EIGHT), *words).returncode == 0
    runner = PDSHRunner(parse_args(sandbox.recorded()), "world")
    command, _, _ = runner.get_cmd({}, {"worker-0": [0]})
    # pdsh joins its words with spaces and gives them to the shell of each host.
    shell_line = " ".join(command[command.index("launch/infer.py") :])
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {shell_line}"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split("\0")[-len(words) - 1 : -1] == words


@pytest.mark.parametrize(
    "name", ["a;touch${IFS}pwned", "$(touch$IFS/pwned)", NASTY.replace("@", "")]
)
def test_host_names_in_run_sh_are_quoted(sandbox, model, name):
    cluster = Cluster((Host(name, (0, 2)), Host("b", (0, 1))), "hostfile")
    done = sandbox.run(run_sh(model, cluster), *IO)
    assert (done.returncode, done.stderr) == (0, "")
    assert sandbox.recorded()[4:6] == ["--include", f"{name}:0,2@b:0,1"]
    assert not list(sandbox.root.rglob("pwned"))


def test_deepspeed_reads_the_include_filter_as_it_was_meant(sandbox, model):
    from deepspeed.launcher.runner import _parse_hostfile, parse_args, parse_inclusion_exclusion

    cluster = Cluster((Host("a", (1, 3)), Host("b", (0, 1))), "hostfile")
    sandbox.run(run_sh(model, cluster), *IO)
    args = parse_args(sandbox.recorded())
    assert (args.user_script, args.user_args[:2]) == ("launch/infer.py", ["--model", str(model)])
    pool = _parse_hostfile(cluster.to_hostfile().splitlines())
    assert parse_inclusion_exclusion(pool, args.include, args.exclude) == {"a": [1, 3], "b": [0, 1]}


def test_run_sbatch_starts_every_task_as_a_rank(sandbox, model):
    done = sandbox.slurm(run_sbatch(model, EIGHT), *IO)
    assert (done.returncode, done.stderr) == (0, "")
    options = ["--kill-on-bad-exit=1", "--distribution=block", "--cpu-bind=none"]
    assert sandbox.recorded(".srun") == options
    assert sandbox.recorded() == [
        *["11", "3", "64", "node3", "24242"],
        *["-u", "launch/infer.py", "--model", str(model), "--config", str(sandbox.bundle), *IO],
    ]


def test_run_sbatch_asks_slurm_for_what_the_plan_needs(model):
    directives = [
        line.removeprefix("#SBATCH --")
        for line in run_sbatch(model, EIGHT).splitlines()
        if line.startswith("#SBATCH")
    ]
    assert directives == [
        *["job-name=ds_moe_ep", "nodes=8", "ntasks=64", "ntasks-per-node=8", "gpus-per-node=8"],
        *["exclusive", "mem=0"],  # whole nodes, with all their memory
    ]


def test_run_sbatch_passes_any_word_unchanged(sandbox):
    done = sandbox.slurm(run_sbatch(Path(NASTY), EIGHT), "--input", NASTY)
    assert (done.returncode, done.stderr) == (0, "")
    words = sandbox.recorded()
    assert words[words.index("--model") + 1] == NASTY and words[-1] == NASTY
    assert not list(sandbox.root.rglob("pwned"))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SLURM_NTASKS": "32"}, "the plan has 64 ranks, but Slurm gave 32 tasks"),
        ({"SCRIPT": "/elsewhere/run.sbatch"}, "no ds_inference.json in /elsewhere. Set CONFIG"),
        ({"INFER": "nowhere/infer.py"}, "no nowhere/infer.py in"),
        ({"SLURM_JOB_ID": ""}, "submit this script with sbatch"),
        (OF_KUBERNETES, f"run.sbatch: {NO_PORT}"),
    ],
)
def test_run_sbatch_refuses_before_any_task_starts(sandbox, model, env, message):
    done = sandbox.slurm(run_sbatch(model, EIGHT), *IO, **env)
    assert done.returncode != 0 and message in done.stderr
    assert not sandbox.record.exists()


def test_run_sbatch_takes_a_folder_that_slurm_cannot_name(sandbox, model):
    done = sandbox.slurm(run_sbatch(model, EIGHT), *IO, SCRIPT="", CONFIG=str(sandbox.bundle))
    assert (done.returncode, done.stderr) == (0, "")


def test_run_sh_says_where_to_start_it(sandbox, model):
    (sandbox.root / "launch" / "infer.py").unlink()
    done = sandbox.run(run_sh(model, EIGHT), *IO)
    assert done.returncode == 2
    assert f"no launch/infer.py in {sandbox.root}. Start it from the folder" in done.stderr


# Stands in for a command that tells whether signals reach it and a child of its own.
WAITING = """#!/usr/bin/env bash
trap 'echo "got $CODE" >> "$RECORD"; kill "$child"; exit "$CODE"' INT TERM HUP
sleep 60 &
child=$!
cat >> "$RECORD"
touch "$RECORD.ready"
wait "$child"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("code", ["0", "1", "130", "143"])
def test_run_sh_hands_signals_on_and_ends_with_130(sandbox, model, number, code):
    # A job that is done in spite of it is done.
    _interrupt(sandbox, model, "deepspeed", number, code, expected=130 if code != "0" else 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_hosts_are_asked_run_sh_starts_none(sandbox, model, number):
    _interrupt(sandbox, model, "ds-moe-ep", number, "130", expected=130)
    assert not Path(f"{sandbox.record}.ssh").exists()  # deepspeed's


def _interrupt(sandbox, model, command, number, code, expected):
    """Sends run.sh a signal while it waits for a command, which then ends with a code."""
    sandbox._write(sandbox.root / "bin" / command, WAITING)
    script = sandbox._write(sandbox.bundle / "run.sh", run_sh(model, EIGHT))
    env = {"PATH": f"{sandbox.root / 'bin'}:{os.environ['PATH']}", "RECORD": str(sandbox.record)}
    with subprocess.Popen(
        [script, *IO],
        cwd=sandbox.root,
        env=env | {"CODE": code},
        stdin=subprocess.PIPE,  # stays open: the job must not wait for it
        # Tests that run in the background, or under nohup, have some of them ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        try:
            until_s = time.monotonic() + 30
            while not Path(f"{sandbox.record}.ready").exists():
                assert process.poll() is None and time.monotonic() < until_s
                time.sleep(0.02)
            process.send_signal(number)
            assert process.wait(timeout=30) == expected
            # While hosts are asked, run.sh itself may be the first to end.
            while not sandbox.record.read_text() and time.monotonic() < until_s:
                time.sleep(0.02)
        finally:
            process.kill()
    assert sandbox.record.read_text() == f"got {code}\n"


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (1, 1), (2, 2), (130, 130), (247, 1), (255, 1)]
)
def test_run_sh_ends_a_broken_job_with_1(sandbox, model, code, expected):
    # 247: a rank was killed with its supervisor. 255: ssh has lost a host.
    sandbox._write(sandbox.root / "bin" / "deepspeed", f"#!/bin/sh\nexit {code}\n")
    assert sandbox.run(run_sh(model, EIGHT), *IO).returncode == expected


@pytest.mark.parametrize("second", [Host("b", (0, 1, 2)), Host("b", (1, 3)), Host("b", (0,))])
def test_hosts_that_srun_cannot_express_are_refused(second):
    with pytest.raises(ConfigError, match="b gives slots .*Use run.sh"):
        run_sbatch(Path("m"), Cluster((Host("a", (0, 1)), second), "hostfile"))


def test_quoting_is_what_the_shell_undoes():
    assert shlex.quote(NASTY) in run_sbatch(Path(NASTY), EIGHT)
