"""What happens in virtual time. At equal times: ends of steps, arrivals, begins of steps, the
daemon's turns, heartbeats; and among the same kind, what was scheduled first.
"""
