"""The arithmetic of a plan, one file a quantity, on :class:`..settings.Settings`."""
