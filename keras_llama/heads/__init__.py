"""Task heads on a LLaMA backbone: one file each, on `Task`, and what they share."""
