"""The project against its peers, side by side in one run; RESULTS.md holds what was measured."""
