"""How fast artifacts travel: ours against a single stream, boto3's defaults, `aws s3 cp` and s5cmd.

    python scripts/ceph_rgw.py run -- python benchmarks/store.py            # 2 GiB in 4 shards, loopback
    python scripts/ceph_rgw.py run -- python benchmarks/store.py --delay-ms 10 --gib 0.5   # 20 ms more round trip

Each contender runs in a process of its own; wall and CPU seconds are taken around the transfer, with the client made
and connected, and around the whole of a command-line tool. Ours includes what the others do not do: hashing before the
upload and checking every byte after the download. The best of `--repeats` runs counts, contenders taking turns. `cp`
between two folders is the physical limit; `single stream` is what KFP's launcher does: one object after another, one
stream each.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BUCKET = "grpo-benchmark"
MIB = 1 << 20
Seconds = tuple[float, float]
"""Wall, and CPU of this process and of those it started that have ended."""


def clock() -> Seconds:
    """Now."""
    return time.perf_counter(), sum(os.times()[:4])


def since(started: Seconds) -> Seconds:
    """From then to now."""
    now = clock()
    return now[0] - started[0], now[1] - started[1]


def client(endpoint: str):
    """A plain boto3 client, as anybody makes one."""
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"})
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)


def ours(endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """Upload as `publish` does, download as `fetch` does, without the node cache."""
    from components.common import artifacts
    from components.common.manifest import Manifest, Producer, content_digest, now
    from components.common.store import open_store

    store = open_store(f"s3://{BUCKET}/{prefix}?endpoint={endpoint}")
    store.stat("warm")  # the connection and the client's own set-up, as in a stage that runs already
    record = folder.parent / f"{prefix}.json"
    started = clock()
    if up:
        files = tuple(artifacts.upload(store, {path.name: path for path in sorted(folder.iterdir())}))
        seconds = since(started)
        producer = Producer(stage="", key="", settings_digest="", code_version="")
        record.write_bytes(
            Manifest(
                kind="policy", digest=content_digest("policy", files), files=files, producer=producer, fine_tune="b",
                run="b", created=now(), store=store.url,
            ).dump()
        )  # fmt: skip
        return seconds
    artifacts.fetch(store, Manifest.load(record), folder)
    return since(started)


def single_stream(endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """One object after another, one connection; parts of 5 MiB one after another on the way up, as gocloud's writer."""
    from boto3.s3.transfer import TransferConfig

    s3 = client(endpoint)
    s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    started = clock()
    if up:
        config = TransferConfig(use_threads=False, multipart_chunksize=5 * MIB, multipart_threshold=5 * MIB)
        for path in sorted(folder.iterdir()):
            s3.upload_file(str(path), BUCKET, f"{prefix}/{path.name}", Config=config)
    else:
        for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
            body = s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"]
            with (folder / Path(entry["Key"]).name).open("wb") as file:
                for chunk in body.iter_chunks(MIB):
                    file.write(chunk)
    return since(started)


def boto3_defaults(endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """`upload_file` and `download_file` as they come: ten threads, 8 MiB parts, a file at a time."""
    s3 = client(endpoint)
    names = [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
    started = clock()
    if up:
        for path in sorted(folder.iterdir()):
            s3.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
    else:
        for name in names:
            s3.download_file(BUCKET, name, str(folder / Path(name).name))
    return since(started)


def _tool(*command: str) -> Seconds:
    started = clock()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return since(started)


def aws_cli(endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """`aws s3 cp --recursive`."""
    ends = [f"{folder}/", f"s3://{BUCKET}/{prefix}/"]
    program = shutil.which("aws", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "aws"
    return _tool(
        program, "--endpoint-url", endpoint, "s3", "cp", "--recursive", "--quiet", *(ends if up else ends[::-1])
    )


def s5cmd(endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """`s5cmd cp`, the fastest tool known for downloads."""
    ends = [f"{folder}/", f"s3://{BUCKET}/{prefix}/"] if up else [f"s3://{BUCKET}/{prefix}/*", f"{folder}/"]
    return _tool("s5cmd", "--endpoint-url", endpoint, "cp", *ends)


def local_cp(endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """`cp` between two folders."""
    other = folder.parent / f"{prefix}-cp"
    if up:
        return _tool("cp", "-r", str(folder), str(other))
    return _tool("cp", *(str(path) for path in sorted(other.iterdir())), str(folder))


CONTENDERS: dict[str, Callable[[str, str, Path, bool], Seconds]] = {
    "ours": ours,
    "single stream": single_stream,
    "boto3 defaults": boto3_defaults,
    "aws s3 cp": aws_cli,
    "s5cmd": s5cmd,
    "local cp": local_cp,
}


def run_one(name: str, endpoint: str, prefix: str, folder: Path, up: bool) -> Seconds:
    """Wall and CPU seconds of a contender in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([name, endpoint, prefix, str(folder), up])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    wall, cpu = json.loads(done.stdout)
    return wall, cpu


def imports() -> None:
    """What a stage has imported long before it transfers anything."""
    import blake3
    import boto3.s3.transfer
    import google_crc32c
    import pydantic

    assert blake3 and boto3 and google_crc32c and pydantic


def make_shards(folder: Path, size: int, shards: int) -> None:
    """Safetensors files of random bf16 weights."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(shards):
        weights = random.integers(0, 2**16, size // shards // 2, dtype=np.uint16)
        save_file({"weights": weights}, folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors")


def clear(endpoint: str, prefix: str) -> None:
    """Removes what a contender stored, so that the server's disk does not fill."""
    s3 = client(endpoint)
    for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []):
        s3.delete_object(Bucket=BUCKET, Key=entry["Key"])


def compare(endpoint: str, server: str, names: list[str], scratch: Path, repeats: int) -> dict[str, list[list[float]]]:
    """Seconds and CPU seconds, up and down, of each contender's runs."""
    results: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            prefix, target = uuid.uuid4().hex[:8], scratch / "target"
            wall_up, cpu_up = run_one(name, endpoint, prefix, scratch / "source", True)
            target.mkdir()
            wall_down, cpu_down = run_one(name, endpoint, prefix, target, False)
            for path in (scratch / "source").iterdir():
                assert (target / path.name).stat().st_size == path.stat().st_size
            results[name].append([wall_up, cpu_up, wall_down, cpu_down])
            shutil.rmtree(target)
            shutil.rmtree(scratch / f"{prefix}-cp", ignore_errors=True)
            clear(server, prefix)
            print(f"  {name}: up {wall_up:.1f} s, down {wall_down:.1f} s", file=sys.stderr)
    return results


def table(results: dict[str, list[list[float]]]) -> str:
    """The best of each, and how many times ours it is."""
    best = {name: [min(column) for column in zip(*runs, strict=True)] for name, runs in results.items()}
    lines = ["| | up, s | CPU, s | down, s | CPU, s |", "|---|---|---|---|---|"]
    for name, values in best.items():
        cells = [f"{value:.1f} ({value / mine:.2f}x)" for value, mine in zip(values, best["ours"], strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="latency to add, one way")
    parser.add_argument("--window-kib", type=int, default=1024, help="bytes of a stream under way, with --delay-ms")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, endpoint, prefix, folder, up = json.loads(options.one)
        imports()
        print(json.dumps(CONTENDERS[name](endpoint, prefix, Path(folder), up)))
        return
    server = endpoint = os.environ["GRPO_S3_ENDPOINT"]
    os.environ["GRPO_CACHE_DIR"] = "off"
    client(server).create_bucket(Bucket=BUCKET)
    names = [name for name in options.contenders if name != "s5cmd" or shutil.which("s5cmd")]
    proxy = None
    if options.delay_ms:
        window, delay = f"--window-kib={options.window_kib}", f"--delay-ms={options.delay_ms}"
        script = str(ROOT / "benchmarks" / "delay_proxy.py")
        command = [sys.executable, script, server.rpartition(":")[2], delay, window]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert proxy.stdout
        endpoint = f"http://127.0.0.1:{proxy.stdout.readline().strip()}"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_shards(scratch / "source", int(options.gib * 2**30), options.shards)
        results = compare(endpoint, server, names, scratch, options.repeats)
    if proxy:
        proxy.kill()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    what = f"{options.gib} GiB in {options.shards} shards, best of {options.repeats}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {what}, {2 * options.delay_ms:.0f} ms added")
    print(table(results))


if __name__ == "__main__":
    main()
