"""How many cells there are, how heads share them, and which ones stay: arithmetic on arrays."""
