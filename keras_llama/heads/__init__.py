"""Task heads on a LLaMA backbone: one file each, on the base class of `task.py`."""
