"""The pocket world: a small rendered world with a teacher, judges and a student, which runs on a laptop CPU.

`world` defines identities and scenes, `render` renders them with `draw` and `places`, `captions` describes them in
plain English, and `pretrain` trains the models in `weights/`. The teacher learns from renders, the student only from
the teacher's grids.
"""
