"""Measures of several models side by side."""
