"""Sources of pictures and the order they are read in."""
