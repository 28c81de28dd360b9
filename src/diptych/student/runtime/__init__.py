"""How a student runs on the machine at hand: memory presets, speed, caches, quantization, several GPUs."""
