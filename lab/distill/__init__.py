"""Make a drafter for a model: answers of its own, and a small head trained to foresee them."""
