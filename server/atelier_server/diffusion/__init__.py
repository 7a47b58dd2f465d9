"""The maths: base models, their denoiser, schedulers and images."""
