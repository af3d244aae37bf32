"""Our own entry as a script, for torchrun."""

import sys

from rmoe_megablocks.megatron import pretrain

if __name__ == "__main__":
    sys.exit(pretrain.main(sys.argv[1:]))
