"""The pocket world: a small drawn world with its own teacher, judges and student, which works on a laptop CPU.

`world` says what there is (identities and scenes), `render` draws it with `draw` and `places`, `captions` describes it
in plain English, and `pretrain` trains the models in `weights/` from it. The teacher learns from renders; the student
only from the teacher's own grids.
"""
