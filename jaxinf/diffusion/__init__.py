"""The diffusion process: noise schedules, the training objective and samplers."""
