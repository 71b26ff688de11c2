"""A session along a route of nodes, and passes without one."""
