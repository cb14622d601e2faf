"""Where in a network: its blocks, and what a component's name means there."""
