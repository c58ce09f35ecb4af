"""Reports as one HTML file that can be sent around: the page they share, and figures that stand in it."""
