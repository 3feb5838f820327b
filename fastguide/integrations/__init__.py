"""Ways to use fastguide inside other projects."""
