"""A real Slurm on one machine, as root and without systemd: munged, slurmctld and two slurmd in a temporary folder.

The two nodes, HOST and HOST-2, claim 64 CPUs, 600 GB and 8 GPUs each, so that the shipped job files run as they are.
Partition `one` (the default) has the first node, partition `both` has both. Sockets, ports and keys are the cluster's
own: it neither meets nor disturbs another Slurm of this machine.

    with SlurmCluster() as cluster:
        job = cluster.run_job("slurm/train_exp2_2gpu.slurm", "num_train_epochs=1", cwd=repo)
        job.wait_for_state("RUNNING")
        job.preempt()
        job.wait_for_restart()
        job.wait_for_state("COMPLETED")
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def find(program):
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")


def why_unavailable():
    """The reason why no Slurm can be started here, or None."""
    missing = [program for program in PROGRAMS if not find(program)]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd and munged of the test cluster want root"


def free_ports(count):
    """Distinct TCP ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class SlurmCluster:
    """Started by `with`. `folder` is its own, in /tmp: Unix sockets want a short path, munge one open to everybody."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.host = socket.gethostname().split(".")[0]
        self.daemons = []

    # ---- start and stop

    def __enter__(self):
        self.write_files()
        try:
            munge = self.folder / "munge"
            places = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
            self.start("munged", "--foreground", f"--socket={munge / 'socket'}", *places)
            self.wait_until((munge / "socket").exists, "munged has no socket")
            self.start("slurmctld", "-D")
            for node in (self.host, f"{self.host}-2"):
                self.start("slurmd", "-D", "-N", node)
            self.wait_until(self.is_idle, "the nodes are not idle")
        except BaseException:
            self.stop()  # and leave the logs
            raise
        return self

    def __exit__(self, *_):
        try:
            self.end_jobs()
        finally:
            self.stop()
        shutil.rmtree(self.folder)

    def start(self, daemon, *arguments):
        with open(self.folder / f"{daemon}-{len(self.daemons)}.out", "wb") as output:
            command = [find(daemon), *arguments]
            self.daemons.append(subprocess.Popen(command, env=self.environment(), stdout=output, stderr=output))

    def end_jobs(self):
        """Kill every job and wait until all are gone."""
        self.call("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.call("scancel", "--user=root", check=False)
        self.wait_until(lambda: not self.call("squeue", "--noheader", check=False), "jobs are left")

    def stop(self):
        """End the daemons that this object started, the last one first."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def environment(self):
        """This process's environment, without what another Slurm that runs these tests may have put there."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def write_files(self):
        folder, first, second = self.folder, self.host, f"{self.host}-2"
        for name in ("munge", "state", first, second):
            (folder / name).mkdir(mode=0o711)
        subprocess.run([find("mungekey"), "--create", f"--keyfile={folder / 'munge' / 'key'}"], check=True)
        for node in (first, second):
            for index in range(8):  # plain empty files count as GPUs too, but only devices get CUDA_VISIBLE_DEVICES set
                (folder / node / f"gpu{index}").symlink_to("/dev/null")
        gpus = "".join(f"NodeName={node} Name=gpu File={folder}/{node}/gpu[0-7]\n" for node in (first, second))
        (folder / "gres.conf").write_text(gpus)
        control_port, first_port, second_port = free_ports(3)
        machine = f"NodeHostname={self.host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=600000 Gres=gpu:8 State=UNKNOWN"
        (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={self.host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName={first} Port={first_port} {machine}
NodeName={second} Port={second_port} {machine}
PartitionName=one Nodes={first} Default=YES MaxTime=INFINITE State=UP
PartitionName=both Nodes={first},{second} MaxTime=INFINITE State=UP
""")

    # ---- use

    def call(self, command, *arguments, cwd=None, environment=None, check=True):
        """What a Slurm command prints. RuntimeError with its complaint when it fails and `check` is set."""
        done = subprocess.run(
            [find(command), *map(str, arguments)],
            env={**self.environment(), **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout.strip()

    def node_states(self):
        return set(self.call("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def is_idle(self):
        return self.node_states() == {"idle"}

    def run_job(self, script, *overrides, cwd, options=(), environment=None):
        """`sbatch OPTIONS SCRIPT OVERRIDES` in the folder `cwd`, a repo; its `Job`."""
        job_id = self.call("sbatch", "--parsable", *options, script, *overrides, cwd=cwd, environment=environment)
        return Job(self, job_id, Path(cwd))

    def wait_until(self, condition, complaint, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [Path(daemon.args[0]).name for daemon in self.daemons if daemon.poll() is not None]
            assert not dead, f"{dead} ended by itself; see {self.folder}"
            assert time.monotonic() < deadline, f"{complaint} after {seconds} s; see {self.folder}"
            time.sleep(0.1)


@dataclass
class Job:
    cluster: SlurmCluster
    id: str  # "12", or "12_0" for a task of an array
    repo: Path

    def task(self, index):
        """Task `index` of this array."""
        return Job(self.cluster, f"{self.id}_{index}", self.repo)

    def field(self, name):
        """A field of `scontrol show job`: JobState, Restarts, ExitCode ("code:signal"), ..."""
        words = self.cluster.call("scontrol", "show", "job", "--oneliner", self.id).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    @property
    def state(self):
        return self.field("JobState")

    @property
    def restarts(self):
        return int(self.field("Restarts"))

    @property
    def exit_code(self):
        return int(self.field("ExitCode").split(":")[0])

    def log(self, stream="StdOut"):
        """What the job has written so far to `StdOut` or `StdErr`."""
        path = Path(self.field(stream))
        return path.read_text(errors="replace") if path.exists() else ""

    def preempt(self):
        """What `--signal=B:USR1@300` does before the time limit: SIGUSR1 to the batch shell alone."""
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.id)

    def wait_for_state(self, wanted, seconds=60):
        """An AssertionError with the job's log after `seconds`, and at once when the job ends in another state."""

        def is_reached():
            state = self.state
            assert state == wanted or state not in ENDED, f"job {self.id} is {state}, not {wanted}:\n{self.story()}"
            return state == wanted

        self.wait_for(is_reached, f"is not {wanted}", seconds)

    def wait_for_restart(self, count=1, seconds=60):
        """Wait until the job has been requeued `count` times in all and runs again."""

        def is_queued_again():
            return self.restarts == count and self.state == "PENDING" and "completing" not in self.cluster.node_states()

        self.wait_for(is_queued_again, f"has not been requeued {count} times", seconds)
        # Slurm lets it wait for 121 s. It needs only a second, until the nodes tell its new credentials from the old.
        time.sleep(1.5)
        self.cluster.call("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.wait_for(lambda: self.state != "PENDING", "does not start again", seconds)

    def wait_for_log(self, text, seconds=60):
        self.wait_for(lambda: text in self.log(), f"has not written {text!r}", seconds)

    def wait_for(self, condition, complaint, seconds=60):
        try:
            self.cluster.wait_until(condition, f"job {self.id} {complaint}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self):
        return f"--- out\n{self.log()}\n--- err\n{self.log('StdErr')}"
