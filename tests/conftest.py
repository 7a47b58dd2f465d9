"""Before anything imports torch: one thread, and no spinning.

Two OpenMP threads beside a busy neighbour make a small forward 60 times slower, because they spin while they
wait (docs/decisions.md).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
