"""A real S3 server for the tests and benchmarks: Ceph's RADOS gateway, one monitor and one OSD on this machine.

    python scripts/ceph_rgw.py install        # once: packages into the cache, about 20 s
    python scripts/ceph_rgw.py run            # starts a cluster, prints one JSON line, serves until stdin closes
    python scripts/ceph_rgw.py run -- CMD …   # the same around a command, which finds AWS_* and GRPO_S3_* set

The packages come from Debian sid with their whole closure, C library included, and are unpacked into a folder, never
installed: the programs run through that folder's own dynamic loader, so the host needs `apt-get` and `dpkg-deb` only,
and no root. sid moves, so what was downloaded once is kept (`~/.cache/grpo-pipeline/ceph`).
"""

import argparse
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common", "ceph-base")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo-pipeline" / "ceph"
ROOT = CACHE / "root"
BUCKET = "grpo"
DEADLINE_SECONDS = 120
OSD_BYTES = 32 << 30
"""Size of the sparse file the objects lie in; on the disk it takes what is in it."""

CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = 127.0.0.1:{mon_port}
ms_bind_msgr2 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = {data}/keyring
run_dir = {data}
admin_socket =
pid_file =
log_file = {data}/$name.log
log_to_stderr = false
mon_data = {data}/mon
osd_data = {data}/osd
rgw_data = {data}/rgw
plugin_dir = {lib}/ceph
erasure_code_dir = {lib}/ceph/erasure-code
osd_class_dir = {lib}/rados-classes
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
mon_data_avail_crit = 1
mon_osd_full_ratio = 0.99
osd_failsafe_full_ratio = 0.995
osd_memory_target = 939524096
osd_mclock_skip_benchmark = true
osd_op_queue = wpq
osd_objectstore = bluestore
bluestore_block_create = true
bluestore_block_size = {osd_bytes}
bluestore_block_wal_create = false
bluestore_block_db_create = false
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_gc_obj_min_wait = 5
rgw_enable_usage_log = false
rgw_dns_name =
rgw_run_sync_thread = false
rgw_thread_pool_size = 64
"""


class SetupError(Exception):
    """The server cannot be had on this machine; the message says why."""


# --- packages -------------------------------------------------------------------------------------------------------


def install() -> Path:
    """Downloads and unpacks the packages once; gives the folder they lie in.

    Raises:
        SetupError: no apt, or the packages cannot be downloaded.
    """
    if ROOT.is_dir():
        return ROOT
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise SetupError(f"Ceph RGW is unpacked from Debian packages and {tool} is not on this machine")
    if not KEYRING.exists():
        raise SetupError(f"no {KEYRING}: install the package debian-archive-keyring")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ROOT.is_dir():
            _unpack(_download())
    return ROOT


def _mirror() -> str:
    """The Debian mirror this machine is set up with."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    mirrors = [uri for uri in found if uri.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise SystemExit("apt knows no Debian mirror: the packages of Ceph come from Debian")
    return mirrors[0]


def _download() -> list[Path]:
    """The .deb files of PACKAGES and of everything they need, from the cache or from the mirror."""
    kept = sorted((CACHE / "archives").glob("*.deb"))
    if (CACHE / "complete").exists() and kept:
        return kept
    apt = CACHE / "apt"
    for folder in (apt / "lists/partial", apt / "state", CACHE / "archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} sid main\n")
    settings = {
        "Dir::Etc": apt, "Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": apt / "state", "Dir::State::lists": apt / "lists", "Dir::State::status": apt / "status",
        "Dir::Cache": apt, "Dir::Cache::archives": CACHE / "archives",
        "Acquire::Check-Valid-Until": "false", "Acquire::Check-Date": "false", "Acquire::Languages": "none",
        "Acquire::Retries": "3", "APT::Install-Recommends": "false", "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }  # fmt: skip
    (apt / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    for arguments in (["update"], ["install", "-y", "--download-only", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", *arguments], env=os.environ | {"APT_CONFIG": str(apt / "apt.conf")},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SetupError(f"apt-get {arguments[0]} failed: {done.stderr.strip()[-400:]}")
    (CACHE / "complete").touch()
    return sorted((CACHE / "archives").glob("*.deb"))


def _unpack(packages: Sequence[Path]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="root-", dir=CACHE))

    def extract(package: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", package, temporary], check=True, capture_output=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(extract, packages))
    temporary.rename(ROOT)


# --- the cluster ----------------------------------------------------------------------------------------------------


class Cluster:
    """One monitor, one OSD on a sparse file, one gateway; all of it in `data`, all of it gone after `stop`."""

    def __init__(self, data: Path, osd_bytes: int = OSD_BYTES) -> None:
        self.root = install()
        self.data = data
        (self.lib,) = [path.parent for path in self.root.glob("usr/lib/*/rados-classes")]
        (self.loader,) = self.lib.glob("ld-linux*.so.*")
        self.reserved = _reserve_ports(2)
        self.port, mon_port = (one.getsockname()[1] for one in self.reserved)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.access_key, self.secret_key = "grpo-test-key", uuid.uuid4().hex
        self.fsid, self.osd_uuid = str(uuid.uuid4()), str(uuid.uuid4())
        self.mon_address = f"v1:127.0.0.1:{mon_port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        for folder in ("mon", "osd", "rgw"):
            (data / folder).mkdir(parents=True)
        self.configuration = data / "ceph.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                fsid=self.fsid, mon_port=mon_port, port=self.port, data=data, lib=self.lib, osd_bytes=osd_bytes
            )
        )

    def start(self) -> None:
        """Brings everything up and creates the bucket's owner.

        Raises:
            SetupError: a program of the cluster ended, or the gateway does not answer in time.
        """
        self._make_keys()
        self._run(
            "monmaptool", "--create", "--addv", "a", f"[{self.mon_address}]", "--fsid", self.fsid, self.data / "monmap"
        )
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", self.data / "monmap", "--keyring", self.data / "keyring")
        self._spawn("ceph-mon", "-i", "a")
        self._ceph("osd", "new", self.osd_uuid, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", self.osd_uuid)
        self._spawn("ceph-osd", "-i", "0")
        self._run(
            "radosgw-admin", "-n", "client.rgw", "user", "create", "--uid", "grpo", "--display-name", "grpo",
            "--access-key", self.access_key, "--secret-key", self.secret_key,
        )  # fmt: skip
        self._spawn("radosgw", "-n", "client.rgw")
        self._wait()

    def stop(self) -> None:
        """Ends the programs, last started first."""
        for process in reversed(self.processes):
            process.kill()
        for process in self.processes:
            process.wait()
        for one in self.reserved:
            one.close()

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "GRPO_S3_ENDPOINT": self.endpoint,
        }

    def _make_keys(self) -> None:
        keyring = self.data / "keyring"
        capabilities = {
            "mon.": ["--cap", "mon", "allow *"],
            "client.admin": ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"],
            "osd.0": ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"],
            "client.rgw": ["--cap", "mon", "allow *", "--cap", "osd", "allow *"],
        }
        for number, (name, caps) in enumerate(capabilities.items()):
            create = ["--create-keyring"] if number == 0 else []
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *caps)

    def _command(self, program: str, *arguments: str | Path) -> list[str]:
        path = f"{self.lib}:{self.lib / 'ceph'}"
        loader = [str(self.loader), "--library-path", path]
        return [*loader, str(self.root / "usr/bin" / program), *map(str, arguments)]

    def _environment(self) -> dict[str, str]:
        usr = self.root / "usr"
        return {
            "PATH": os.environ["PATH"], "HOME": str(self.data), "CEPH_CONF": str(self.configuration),
            "PYTHONHOME": str(usr), "PYTHONPATH": str(usr / "lib/python3/dist-packages"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            self._command(program, *arguments), env=self._environment(), capture_output=True, text=True,
            timeout=DEADLINE_SECONDS,
        )  # fmt: skip
        if done.returncode:
            raise SetupError(f"{program} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-600:]}")

    def _ceph(self, *arguments: str) -> None:
        python = next((self.root / "usr/bin").glob("python3.[0-9]*")).name
        self._run(python, self.root / "usr/bin/ceph", "--connect-timeout", "30", *arguments)

    def _spawn(self, program: str, *arguments: str | Path) -> None:
        """A program that ends when this process does, however that happens."""
        output = (self.data / f"{program}.out").open("wb")
        self.processes.append(
            subprocess.Popen(
                self._command(program, "-f", *arguments), env=self._environment(), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, preexec_fn=_die_with_parent,
            )
        )  # fmt: skip
        output.close()

    def _wait(self) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end:
            for process in self.processes:
                if process.poll() is not None:
                    raise SetupError(f"{Path(process.args[3]).name} ended with {process.returncode}; see {self.data}")
            try:
                urllib.request.urlopen(self.endpoint, timeout=5)
                return
            except urllib.error.HTTPError:  # it answers: that is enough
                return
            except OSError:
                time.sleep(0.1)
        raise SetupError(f"the gateway did not answer within {DEADLINE_SECONDS} s; see {self.data}")


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it when the starting process is gone (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _reserve_ports(count: int) -> list[socket.socket]:
    """Sockets that hold a port each and do not listen: the system gives the port to nobody else, and a program that is
    told its number may listen there, since it too asks to share it (SO_REUSEADDR). The gateway does so seconds later.
    """
    found = [socket.socket() for _ in range(count)]
    for one in found:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
    return found


@contextmanager
def running(osd_bytes: int = OSD_BYTES) -> Iterator[Cluster]:
    """A cluster in a temporary folder."""
    data = Path(tempfile.mkdtemp(prefix="ceph-"))
    cluster = Cluster(data, osd_bytes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(data, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["install", "run"])
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run beside the server")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.action == "install":
            print(install())
            return 0
        with running() as cluster:
            if command := [part for part in options.command if part != "--"]:
                return subprocess.run(command, env=os.environ | cluster.environment()).returncode
            print(json.dumps(cluster.environment()), flush=True)
            sys.stdin.read()
    except SetupError as error:
        print(f"ceph_rgw: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
