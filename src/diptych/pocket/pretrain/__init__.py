"""Trains the pocket world's models from renders: `python -m diptych.pocket.pretrain --help`.

Every step reads and writes one work folder, can be interrupted and started again, and runs on a CPU or a GPU.
"""
