"""The functions behind `import lindm as ld`, which the commands call, too.

Decision problems are made and solved in double precision on the CPU, independently of the settings of the process, which stay as
they are. The examples of the docstrings run in a directory that holds `tiger.pomdp`, a dataset `data` and a run `run` of
`finetune`.
"""
