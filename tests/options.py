"""Every option of a scheduler, alone, but that zero SNR goes with the spacing that it was made for."""

from __future__ import annotations

from atelier_server.core import SchedulerOptions

OPTIONS: dict[str, SchedulerOptions] = {
    "use_karras_sigmas": SchedulerOptions(use_karras_sigmas=True),
    "use_exponential_sigmas": SchedulerOptions(use_exponential_sigmas=True),
    "use_beta_sigmas": SchedulerOptions(use_beta_sigmas=True),
    "timestep_spacing": SchedulerOptions(timestep_spacing="trailing"),
    "rescale_betas_zero_snr": SchedulerOptions(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "eta": SchedulerOptions(eta=0.7),
}
