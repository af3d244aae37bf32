"""The two passes over a recording: what is in it, and its rows in pieces; samples and shuffles of its rows."""
