"""Folders of another layout, and folders that bring their own code."""
