"""``rmoe plan CONFIG --nodes``: step times from one node to thousands, estimated from bytes, FLOPs and schedules."""
