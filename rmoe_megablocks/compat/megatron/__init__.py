"""What reaches into Megatron's insides, one file a subject; each touched name is listed in ``../touched_names.py``."""
