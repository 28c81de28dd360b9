"""What answers a suite: the students, their baselines, and any diffusers pipeline with a reference input."""
