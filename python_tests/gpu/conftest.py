"""What only a GPU can tell. Without one this folder is not collected; the run's header says so."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
