"""One recipe per task: `python -m tasks.classification`, and so on. They use public names only."""
