"""The scheduler and the memory on a virtual clock: how policies fare under recorded load."""

from fusedkv_jax.serving.simulate.calibration import CalibratedDevice
from fusedkv_jax.serving.simulate.device import Device, device
from fusedkv_jax.serving.simulate.metrics import Record, Summary, summarize
from fusedkv_jax.serving.simulate.real_engine import replay
from fusedkv_jax.serving.simulate.simulator import simulate
from fusedkv_jax.serving.simulate.traces import Arrival, read_trace, requests

__all__ = [
    "Arrival",
    "CalibratedDevice",
    "Device",
    "Record",
    "Summary",
    "device",
    "read_trace",
    "replay",
    "requests",
    "simulate",
    "summarize",
]
