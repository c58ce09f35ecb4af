"""Processes (what noise means), predictions (what a network's output stands for), denoisers and training losses."""

from smalti.diffusion.denoiser import NetworkDenoiser
from smalti.diffusion.prediction import convert_prediction, prediction_types
from smalti.diffusion.processes import Process, make_process, process_names

__all__ = ["NetworkDenoiser", "Process", "convert_prediction", "make_process", "prediction_types", "process_names"]
