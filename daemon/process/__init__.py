"""The daemon as a process: its life, its signals, its log."""
