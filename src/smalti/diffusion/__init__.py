"""Processes (what noise means), predictions (what a network's output stands for), denoisers and training losses."""

from smalti.diffusion.denoiser import NetworkDenoiser, VarianceDenoiser
from smalti.diffusion.prediction import convert_prediction, prediction_types, usable_at_pure_noise
from smalti.diffusion.processes import Interpolant, Process, make_process, process_names
from smalti.diffusion.switch import SwitchedDenoiser

__all__ = [
    "Interpolant",
    "NetworkDenoiser",
    "Process",
    "SwitchedDenoiser",
    "VarianceDenoiser",
    "convert_prediction",
    "make_process",
    "prediction_types",
    "process_names",
    "usable_at_pure_noise",
]
