"""Questions to a finished run, whatever its method: what they ask is pure, and reads only what the run left."""
