"""How the processes of one program find each other: by arguments, variables or the cluster."""

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed  # private: no public name tells or gives these

from fusedkv_jax.processes import CONNECT_SECONDS

# A process that is killed or stopped, or loses its network, is missed after so many seconds, and
# all others end; a process that ends alone waits so long for the others before it does.
HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 20
USER_ERROR_EXIT_CODE = 2


class ProcessesError(ValueError):
    """The processes cannot work together as they were started."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    connect_seconds: int = CONNECT_SECONDS,
) -> None:
    """Join the other processes, if there are any; call it before the first use of a device.

    The first of these that says something decides:

    1. the arguments, where they are missing JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
       JAX_PROCESS_ID, and for the last one JOB_COMPLETION_INDEX (Kubernetes' indexed jobs);
    2. Slurm and Open MPI, inside `srun` or `mpirun` of more than one task;
    3. Cloud TPU virtual machines, whose metadata names the others.

    A second call does nothing. Where not all processes have come after `connect_seconds`, the
    program ends with one line and exit code 2: JAX would abort.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all, the port free there.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      connect_seconds: how long to wait for the others.

    Raises:
      ProcessesError: half of the arguments are missing, one is out of range, or the processes
        disagree on how many they are.
    """
    if connect_seconds < 1:
        raise ProcessesError(f"connect_seconds={connect_seconds}; use 1 or more")
    if jax.distributed.is_initialized():
        return
    explicit = _explicit(coordinator, num_processes, process_id, os.environ)
    arguments = _detected(os.environ) if explicit is None else explicit
    if arguments is None:
        return
    # Its SIGTERM handler would hide the signal until `Interrupts` takes it.
    jax.config.update("jax_enable_preemption_service", False)
    watchdog = threading.Timer(connect_seconds, _give_up, (arguments, connect_seconds))
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=connect_seconds + 10,  # the watchdog comes first
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError:
        if arguments:
            raise
        return  # a TPU machine by itself, which belongs to no cluster that JAX knows
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessesError(
            f"cannot join the other processes ({_name(arguments)}): {reason}"
        ) from None
    finally:
        watchdog.cancel()
    _check_count()


def _explicit(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` that were given, or None where nothing was."""
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None:
        num_processes = _integer(environment, "JAX_NUM_PROCESSES")
    if coordinator is None and num_processes is None and process_id is None:
        return None
    if process_id is None:
        process_id = _integer(environment, "JAX_PROCESS_ID")
    if process_id is None:
        process_id = _integer(environment, "JOB_COMPLETION_INDEX")
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ProcessesError(
            f"{' and '.join(missing)} missing: several processes need coordinator, num_processes "
            "and process_id (flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)"
        )
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ProcessesError(f"coordinator={coordinator} must be HOST:PORT, such as node0:8476")
    assert num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise ProcessesError(
            f"process_id={process_id} must be from 0 to num_processes - 1 = {num_processes - 1}"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _detected(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Which cluster JAX is to ask, or None where there is none or it has one process."""
    # Variables of a step: those of the job are also there where one process runs in its shell.
    tasks = _integer(environment, "SLURM_STEP_NUM_TASKS") or 1
    if tasks > 1 and "SLURM_PROCID" in environment:
        one_a_node = tasks == _integer(environment, "SLURM_STEP_NUM_NODES")
        # JAX gives a task of Slurm one device; alone on its node it takes them all.
        devices = {"local_device_ids": []} if one_a_node else {}
        return {"cluster_detection_method": "slurm", **devices}
    if (_integer(environment, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return {"cluster_detection_method": "ompi"}
    if not cloud_tpu_init.running_in_cloud_tpu_vm or jax.config.values["jax_platforms"] == "cpu":
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ","))
    alone = "," not in hosts and "MEGASCALE_COORDINATOR_ADDRESS" not in environment
    return None if alone else {}


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ProcessesError(f"the environment variable {name}={text} must be a number")
    return int(text)


def _name(arguments: Mapping[str, object]) -> str:
    if "process_id" not in arguments:
        return f"found by {arguments.get('cluster_detection_method', 'Cloud TPU')}"
    return (
        f"process {arguments['process_id']} of {arguments['num_processes']}, coordinator "
        f"{arguments['coordinator_address']}"
    )


def _give_up(arguments: Mapping[str, object], seconds: float) -> None:
    print(
        f"error: not all processes met within {seconds} s ({_name(arguments)}); check that each "
        "runs with a process_id of its own and reaches the coordinator's host and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(USER_ERROR_EXIT_CODE)


def _check_count() -> None:
    """The coordinator does not compare how many processes each of the others expects."""
    state = distributed.global_state
    assert state.client is not None
    if state.process_id == 0:
        state.client.key_value_set("fusedkv/count", str(state.num_processes))
    count = int(state.client.blocking_key_value_get("fusedkv/count", CONNECT_SECONDS * 1000))
    if count != state.num_processes:
        raise ProcessesError(
            f"process {state.process_id} was started with num_processes={state.num_processes} and "
            f"process 0 with {count}; start all with the same number"
        )
