"""Values that cross the boundaries of the project. A leaf: it imports nothing of ours."""
