"""What every HTTP server here has in common: its socket, the names it answers to, and the limits of a connection."""
