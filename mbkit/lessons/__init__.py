"""What the notebooks tell: the published demo, its eight combinations, the map of trainability."""
