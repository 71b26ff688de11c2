"""Where a node's weights come from, how they are handed on, and how they get into its blocks."""
