"""Wrong and odd inputs: each ends in exit code 0 with right results, or in exit code 2 with one line that names it.

``cases/`` has the inputs, a file for each part of the package: a list ``CASES`` of :class:`.case.Case`. A new file is
found by itself. ``server.py`` imports everything once and forks for each case, so that one takes a fraction of a
second and cannot disturb another. A case that trains with one process and an unchanged environment does so in such a
fork too; others start processes as users do. ``python -m tests.odd_inputs.table`` runs all and writes
docs/odd-inputs.md.

A case's command is what a user types, without ``bash`` and ``python -m``::

    pretrain ARGUMENTS     bash launch/pretrain_rmoe.sh ARGUMENTS: the whole check, then "would start N processes"
                           in the place of torchrun, unless the case says ``trains``; several are joined by &&
    rmoe ARGUMENTS         the rmoe command
    sh COMMAND             a shell with the environment's python, torchrun and rmoe on the path
"""
