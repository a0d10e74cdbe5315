"""What every process of the suite has less of: threads and passes of the garbage collector."""

import gc
import os

# Several of these processes run beside each other with small tensors: threads that waited for each other took half of the processor's
# time. Before torch is imported; commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(100_000)  # as in cli.py: imports and the list of tests make a million objects
