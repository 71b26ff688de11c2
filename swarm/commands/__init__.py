"""What the commands of both sides share."""
