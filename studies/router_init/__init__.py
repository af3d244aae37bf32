"""Why a small gru router starts behind the linear one: runs, their comparison, and short measurements.

::

    python -m studies.router_init initial                          # logits of every configuration as drawn
    python -m studies.router_init chain                            # where their spread goes in a gru router
    python -m studies.router_init gradients                        # gradients and steps of routing parameters
    python -m studies.router_init run --runs-dir runs/router_init  # configs/tiny.yaml, arms x seeds; hours
    python -m studies.router_init report --runs-dir runs/router_init
"""
