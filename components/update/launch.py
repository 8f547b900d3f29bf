"""Starting the worker processes: torchrun's own machinery, called in this process.

On a CPU, workers are forked from this process, which has imported everything already: they start in milliseconds. A
process must not be forked once CUDA is in use, so on GPUs they are started anew. The rendezvous of several nodes comes
from torchrun's `PET_*` variables, as Kubeflow Trainer sets them; without them it is this machine.
"""

import logging
import os
import signal
import threading
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from components.common.errors import GrpoError, StageError
from components.update import nodes
from components.update.job import Job, Result, read_failure, write_failure

LAST_LINES = 20
"""Lines of a dead rank's log that the error shows."""
RENDEZVOUS_SECONDS = 20
"""Time to reach this machine's own rendezvous."""
GRACE_SECONDS = 10
"""Time between SIGTERM and SIGKILL for the other ranks."""


class Preload:
    """Imports the heavy modules beside whatever the stage does first."""

    def __init__(self) -> None:
        self.thread = threading.Thread(target=self._import, daemon=True)
        self.thread.start()

    @staticmethod
    def _import() -> None:
        import torch  # noqa: F401
        from torch.distributed import run  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        from components.update import train  # noqa: F401
        from components.update.engine import import_deepspeed

        import_deepspeed()

    def wait(self) -> None:
        """Blocks until the modules are there: a process is not forked in the middle of an import."""
        self.thread.join()


def launch(folder: Path, job: Job) -> Result | None:
    """Runs the job on all of this node's processes and gives what they found; none but on the first node.

    Raises:
        GrpoError: what a worker meant for the user.
        StageError: a worker died; with its last lines.
    """
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    (folder / "job.json").write_text(job.model_dump_json())
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    config, store = _config(job, logs)
    if config.start_method == "fork":
        _import_model(folder / "policy")
    try:
        elastic_launch(config, work)(str(folder))
    except ChildFailedError as error:
        raise _explain(error, folder, logs) from None
    except SignalException as error:
        raise StageError(f"stopped by {error.sigval.name}; nothing was published") from None
    finally:
        del store
    return Result.model_validate_json((folder / "result.json").read_text()) if nodes.rank() == 0 else None


def work(folder: str) -> None:
    """The worker process: trains, or leaves its error for the stage."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # die at once, also inside a collective
    path, rank = Path(folder), int(os.environ["RANK"])
    job = Job.model_validate_json((path / "job.json").read_text())
    _limit_threads(job)
    try:
        _train(path, job, rank)
    except GrpoError as error:
        write_failure(path, rank, error)
        raise SystemExit(3) from None
    except BaseException as error:
        if _is_out_of_memory(error):
            write_failure(path, rank, StageError(_memory_advice(job, error)))
        traceback.print_exc()  # into this rank's log, whose last lines the stage shows
        raise


def _train(folder: Path, job: Job, rank: int) -> None:
    import torch

    from components.update.train import Trainer

    if job.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(job.seed + rank)
    torch.distributed.init_process_group("nccl" if job.device == "cuda" else "gloo")
    result = Trainer(folder, job).run()
    nodes.name_attempt(folder, job.device)
    torch.distributed.barrier()
    if rank == 0:
        (folder / "result.json").write_text(result.model_dump_json())
    torch.distributed.destroy_process_group()


def _config(job: Job, logs: Path) -> tuple[Any, Any]:
    """torchrun's configuration, and the store of the rendezvous where it is this process's own."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.run import config_from_args, get_args_parser

    arguments, store = ["--max-restarts", "0", "--monitor-interval", "0.05", "worker"], None
    if job.settings.num_processes != "auto" or "PET_NPROC_PER_NODE" not in os.environ:
        arguments = ["--nproc-per-node", str(num_processes(job)), *arguments]
    if nodes.count() == 1:
        here, store = _local_rendezvous()
        arguments = [*here, *arguments]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config, _, _ = config_from_args(get_args_parser().parse_args(arguments))
    config.start_method = "fork" if job.device == "cpu" else "spawn"
    config.logs_specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    config.shutdown_timeout = GRACE_SECONDS
    # how a worker ended is told by `_explain`: torchrun's tracebacks before it would be of torchrun
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    return config, store


def _import_model(folder: Path) -> None:
    """Imports the policy's model class here, once for all the processes that are forked from this one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with suppress(OSError, ValueError, KeyError):  # the worker reports what is wrong with a policy
        AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]


def _local_rendezvous() -> tuple[list[str], Any]:
    """torchrun's options for this machine alone, on a port that the system picked and that is held from here on."""
    from torch.distributed import DistError, TCPStore

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def serve(port: int) -> Any:
        patience = timedelta(seconds=RENDEZVOUS_SECONDS)
        return TCPStore("127.0.0.1", port, None, True, patience, wait_for_workers=False, multi_tenant=True)

    while True:
        try:
            store = serve(0)
        except DistError as error:
            problem = str(error).split(". The", 1)[0].splitlines()[0]
            raise StageError(f"update: {problem}; bring the loopback interface up") from None
        try:
            serve(store.port)  # as torchrun is about to: a port's second store in a process is its first
            break
        except DistError:  # but not where an earlier store of this process had that port (torch 2.13): anew, once
            del store
    address = ["--master-addr", "127.0.0.1", "--master-port", str(store.port), "--local-addr", "127.0.0.1"]
    return ["--rdzv-backend", "static", "--node-rank", "0", *address], store


def num_processes(job: Job) -> int:
    """Worker processes of this node."""
    if job.settings.num_processes != "auto":
        return job.settings.num_processes
    if job.device == "cpu":
        return 1
    import torch

    return torch.cuda.device_count()


def _limit_threads(job: Job) -> None:
    import torch

    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(job.settings.num_threads or max(len(os.sched_getaffinity(0)) // processes, 1))


def _explain(error: Any, folder: Path, logs: Path) -> GrpoError:
    """The worker's own error when it left one; else how it ended and its last lines."""
    if (left := read_failure(folder)) is not None:
        return left
    rank, failure = error.get_first_failure()
    how = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "failed"
    hint = "; the host may be out of memory: lower max_tokens_per_microbatch" if failure.exitcode == -9 else ""
    return StageError(f"update: rank {rank} {how}{hint}; nothing was published. Its last lines:\n{_tail(logs, rank)}")


def _tail(logs: Path, rank: int) -> str:
    lines: list[str] = []
    for name in ("stdout.log", "stderr.log"):
        for path in sorted(logs.glob(f"**/{rank}/{name}")):
            lines += path.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:]) or "  (none)"


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _memory_advice(job: Job, error: BaseException) -> str:
    settings = job.settings
    steps = [f"lower max_tokens_per_microbatch (now {settings.max_tokens_per_microbatch})"]
    steps += [] if settings.gradient_checkpointing else ["set gradient_checkpointing = true"]
    steps += [] if settings.zero_stage == 3 else [f"raise zero_stage (now {settings.zero_stage}) on several processes"]
    steps += [] if settings.offload_optimizer else ["set offload_optimizer = true"]
    first = (str(error).splitlines() or [""])[0][:200]
    return f"update: out of memory ({first}): {', or '.join(steps)}"
