"""Studies made once: each writes the figure that the documentation shows."""
