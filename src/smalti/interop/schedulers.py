"""The diffusers scheduler that stands for a run's process and prediction type."""

from typing import Any

from smalti.errors import UserError

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS = {
    "vp_linear_discrete": ("linear", False),
    "vp_cosine_discrete": ("squaredcos_cap_v2", False),
    "vp_linear_zero_snr": ("linear", True),
    "vp_cosine_zero_snr": ("squaredcos_cap_v2", True),
}


def scheduler_config(process: str, prediction_type: str) -> dict[str, Any]:
    """scheduler_config.json of a process by name: DDIM for tables of betas, flow-match Euler for rectified flow.

    Raises UserError for what no scheduler of diffusers stands for.
    """
    if process == "rectified_flow" and prediction_type == "velocity":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    if process in _BETAS and prediction_type in _PREDICTIONS:
        schedule, zero_snr = _BETAS[process]
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": schedule,
            "rescale_betas_zero_snr": zero_snr,
            "prediction_type": _PREDICTIONS[prediction_type],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "trailing",
        }
    known = [f"{p} with {', '.join(_PREDICTIONS)}" for p in _BETAS] + ["rectified_flow with velocity"]
    raise UserError(
        f"diffusers has no scheduler for process={process} with prediction_type={prediction_type}; "
        f"it has some for {'; '.join(known)}"
    )
