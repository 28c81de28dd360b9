"""Training a student: the two-panel objective, its data, and a loop that can be killed at any moment.

objective (the loss) · draws (keyed noise, order) · latents, text (what goes in) · parts (what is trained, AdamW, EMA) ·
checkpoint, metrics (what survives a kill) · validate, loop. Everything here takes tensors, modules and folders;
`stages/distill.py` ties it to a recipe.
"""
