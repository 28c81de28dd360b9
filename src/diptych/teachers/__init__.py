"""What diptych knows about teachers that others made, before any weight is read.

`calls` is the table of how each pipeline class takes guidance, `distilled` finds step-distilled teachers, and `opening`
is the one way to open a pipeline's folder. Nothing here imports torch before a folder is opened.
"""
