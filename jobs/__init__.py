"""What a user submits: specs, plans, manifests, runs, and the one command line."""
