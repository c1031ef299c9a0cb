"""The training room: loop, optimisers and schedules, checkpoint store, journal."""
