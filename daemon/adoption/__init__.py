"""What SmartSpec brings, measured; and when an engine is left to its own setting."""
