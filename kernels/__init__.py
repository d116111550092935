"""One file, one op: its reference, each stack's version of it, its FLOPs and its bytes."""
