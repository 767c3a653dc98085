"""Which processes a program belongs to, from its arguments and the environment's variables."""

import pytest

from fusedkv_jax.processes import ProcessesError, cluster

SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
KUBERNETES = {
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476",
    "JAX_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
}


def _arguments(environment, coordinator=None, num_processes=None, process_id=None):
    explicit = cluster._explicit(coordinator, num_processes, process_id, environment)
    return cluster._detected(environment) if explicit is None else explicit


def _numbers(arguments):
    return [arguments[n] for n in ("coordinator_address", "num_processes", "process_id")]


def test_arguments_come_before_the_environment():
    found = _arguments(KUBERNETES | SLURM, "node0:1234", 8, 5)
    assert _numbers(found) == ["node0:1234", 8, 5]
    assert found["cluster_detection_method"] == "deactivate"


def test_variables_and_the_index_of_a_kubernetes_job():
    assert _numbers(_arguments(KUBERNETES)) == ["run-workers-0-0.run:8476", 4, 3]
    assert _numbers(_arguments(KUBERNETES | {"JAX_PROCESS_ID": "1"}))[2] == 1


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JOB_COMPLETION_INDEX": "0"},  # any indexed job
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # the shell of a job, outside srun
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_needs_nothing(environment):
    assert _arguments(environment) is None


def test_a_task_of_slurm_has_all_devices_where_it_is_alone_on_its_node():
    several = _arguments(SLURM | {"SLURM_STEP_NUM_NODES": "2"})
    assert several == {"cluster_detection_method": "slurm"}
    alone = _arguments(SLURM | {"SLURM_STEP_NUM_NODES": "4"})
    assert alone == {"cluster_detection_method": "slurm", "local_device_ids": []}


def test_open_mpi():
    assert _arguments({"OMPI_COMM_WORLD_SIZE": "2"}) == {"cluster_detection_method": "ompi"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "node0:1"}, "num_processes and process_id missing"),
        ({"process_id": 0}, "coordinator and num_processes missing"),
        ({"coordinator": "node0:1", "num_processes": 2}, "process_id missing"),
        ({"coordinator": "node0", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "node0:70000", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "n:1", "num_processes": 2, "process_id": 2}, "process_id=2 must be from"),
        ({"coordinator": "n:1", "num_processes": 2, "process_id": -1}, "process_id=-1 must be"),
    ],
)
def test_mistakes_are_one_clear_line(given, message):
    with pytest.raises(ProcessesError, match=message) as caught:
        _arguments({}, **given)
    assert "\n" not in str(caught.value)


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(ProcessesError, match="JAX_NUM_PROCESSES=four must be a number"):
        _arguments(KUBERNETES | {"JAX_NUM_PROCESSES": "four"})
