"""A real Slurm on this machine, on the loopback interface only, for tests: `with Slurm(folder) as cluster: ...`.

Debian's slurm-wlm and munge, started without systemd, Docker or an accounting database: one controller, one node
with two cores and two GPUs (character devices that are none), a partition, one whose preempted jobs are cancelled, and an urgent one that
preempts both. An array holds at most five jobs of ours.
Everything is stopped at the end, however the tests end.
Needs root and the commands of `make test-system-deps`. Run as a script, `python tests/slurm.py COMMAND...` starts it, runs the command, and stops it.
"""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge/sock,cred_expire=5
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.log
MailProg=/bin/true
ProctrackType={proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_continue
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=3
MinJobAge=3600
MaxArraySize=6
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={d}/log/jobcomp.txt
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 MaxTime=INFINITE PriorityTier=1 GraceTime=5
PartitionName=volatile Nodes=ALL DefaultTime=60 PriorityTier=1 GraceTime=5 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""
FREEZER = Path("/sys/fs/cgroup/freezer")


class Slurm:
    """The daemons and their folder; a context manager.

    Args:
        folder: where configuration, state and logs go.
        cpus: cores that the node says it has.
    """

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder, self.cpus = folder, cpus
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Slurm":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self("scancel", "--user=root", check=False)
        self.stack.close()

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a command against this cluster and return what it prints."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which commands find this cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def states(self) -> dict[str, str]:
        """Job -> Slurm's word for its state, of all jobs so far."""
        lines = self("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T").splitlines()
        return dict(line.split("|") for line in lines)

    def start_controller(self) -> None:
        self("slurmctld")

    def stop_controller(self) -> None:
        self._end("slurmctld")

    # --- inside ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for name in ("munge", "state", "spool", "run", "log", "gpu"):
            (self.folder / name).mkdir(parents=True)
        port, node_port = _free_ports(2)
        freezer = os.access(FREEZER / "cgroup.procs", os.W_OK)
        (self.folder / "slurm.conf").write_text(CONFIG.format(
            d=self.folder, port=port, node_port=node_port, cpus=self.cpus, host=socket.gethostname().split(".")[0],
            proctrack="proctrack/cgroup" if freezer else "proctrack/linuxproc"))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu/nvidia[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        for number in range(2):
            subprocess.run(["mknod", str(self.folder / "gpu" / f"nvidia{number}"), "c", "1", "3"], check=True)
        self._start_munge()
        if freezer:
            self.stack.callback(self._remove_cgroup)
        self.stack.callback(self._end, "slurmctld")
        self.start_controller()
        self.stack.callback(self._end, "slurmd")
        self("slurmd", "-N", "localhost")
        _wait(lambda: "idle" in self("sinfo", "-h", "-o", "%t", check=False), "the node to be idle")
        _wait(lambda: subprocess.run(["srun", "-Qn1", "--immediate=5", "true"], env=self.environment, capture_output=True).returncode == 0,
              "a first job")  # idle is said before jobs can start

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        for folder in (munge, *munge.parents):  # munged refuses a socket that others cannot reach
            if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
        self.stack.callback(self._end, "munged", munge / "pid")
        self("munged", f"--key-file={munge}/key", f"--socket={munge}/sock", f"--seed-file={munge}/seed", f"--pid-file={munge}/pid",
             f"--log-file={munge}/log", "--force")

    def _end(self, daemon: str, pid_file: Path | None = None) -> None:
        """End one of our own daemons, by the process number it wrote."""
        pid_file = pid_file or self.folder / "run" / f"{daemon}.pid"
        try:
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError):
            return
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _remove_cgroup() -> None:
        for folder in sorted(FREEZER.glob("slurm_localhost/**/"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait(true, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm: waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder)) as cluster:
        sys.exit(subprocess.run(sys.argv[1:], env=cluster.environment).returncode)
