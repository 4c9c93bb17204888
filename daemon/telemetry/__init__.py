"""What the daemon did, kept and shown: a process of its own that reads the event bus."""
