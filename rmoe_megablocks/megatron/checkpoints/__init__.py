"""Checkpoints: what lies in a folder, what a run may continue from, what survives kills, damage and other layouts."""
