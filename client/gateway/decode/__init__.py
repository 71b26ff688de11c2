"""The decode loop: many sessions, the ends of the model computed for all of them at once."""
