"""From files people have to files the runtime opens."""
