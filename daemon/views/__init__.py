"""What people look at: each reads what the daemon publishes, from a process of its own."""
