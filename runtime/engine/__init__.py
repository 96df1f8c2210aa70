"""Computing with an open model: contexts, and whoever schedules what they compute."""
