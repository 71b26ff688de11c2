"""The paths of the HTTP API, and how answers are sent."""
